"""One, two and four processes, by DDP and by FSDP2: the same rollouts to the bit, and the same weights but rounding."""

import many_run
import pytest
import torch
from torchrun import launched


@pytest.fixture(scope="module")
def one(pipeline_folder, tmp_path_factory):
    return many_run.runs(tmp_path_factory.mktemp("one"), pipeline_folder, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "kind"), [(2, "ddp"), (4, "ddp"), (4, "fsdp2")])
def test_the_number_of_processes_changes_nothing_but_rounding(one, world, kind, pipeline_folder, tmp_path):
    results = launched("many_run.py", tmp_path, pipeline_folder, kind, processes=world)
    for name, alone in one.items():
        parts = [result[name] for result in results]
        assert alone["world"] == 1 and [part["world"] for part in parts] == [world] * world
        assert (parts[0]["type"] == "FSDP") == (kind == "fsdp2") == bool(parts[0]["shards"][1])
        rollouts = torch.cat([part["final"] for part in parts])
        assert torch.equal(rollouts, alone["final"]), "batches of one shape"
        for key, value in alone["weights"].items():
            assert all(torch.equal(part["weights"][key], parts[0]["weights"][key]) for part in parts), "in step"
            torch.testing.assert_close(parts[0]["weights"][key], value, atol=1e-5, rtol=0)
        assert [r for _, r in parts[0]["curve"]] == pytest.approx([r for _, r in alone["curve"]], abs=1e-5)
    assert len(one["equal"]["curve"]) == 5
