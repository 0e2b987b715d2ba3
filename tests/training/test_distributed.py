"""Two processes do what one does: the same noise, the same groups, the same update; a fault on one stops both."""

import json
import os
import subprocess
import sys

import distributed_run
import pytest
import tiny
import torch

HERE = tiny.ROOT / "tests"


@pytest.fixture(scope="module")
def two(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [*command, str(HERE / "distributed_run.py"), str(folder), str(pipeline_folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_are_one(two, pipeline_folder, tmp_path):
    folder, results = two
    first, second = (result["straight"] for result in results)
    assert first["world"] == second["world"] == 2, "really two processes"
    one = distributed_run.run(tmp_path, pipeline_folder, 4)
    assert one["world"] == 1
    torch.testing.assert_close(torch.cat([first["final"], second["final"]]), one["final"], atol=1e-5, rtol=0)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), "the processes stay in step"
    assert [r for _, r in first["curve"]] == pytest.approx([r for _, r in one["curve"]], abs=1e-5)
    key = "eval/annealed_2/judge"
    assert first["evaluations"][-1][key] == pytest.approx(one["evaluations"][-1][key], abs=1e-4)
    lines = [(path / "metrics.jsonl").read_text().count("\n") for path in (folder / "straight", tmp_path)]
    assert lines[0] == lines[1], "one process writes the log"


def test_the_doctor_of_two_processes_is_one_and_leaves_no_trace(two):
    _, results = two
    first, second = (result["straight"]["report"] for result in results)
    assert first.findings == second.findings == () and first.images == 8 and first.groups == 2
    assert first.rewards == second.rewards and first.gradients == second.gradients and first.pixels == second.pixels
    for key, value in results[0]["straight"]["weights"].items():  # "resumed" was never examined
        assert torch.equal(value, results[0]["resumed"]["weights"][key])


def test_a_reward_that_fails_on_one_process_stops_both_and_loses_nothing(two):
    _, results = two
    assert "a reward failed on another process" in results[0]["error"]
    assert "ConnectionError: judge is down" in results[1]["error"]
    assert [result["kept"] for result in results] == [2, 2]
    for key, value in results[0]["straight"]["weights"].items():
        assert torch.equal(value, results[0]["resumed"]["weights"][key])
    assert results[0]["straight"]["curve"] == results[1]["resumed"]["curve"]


def test_a_signal_to_one_process_stops_both_and_loses_nothing(two):
    _, results = two
    assert [result["code"] for result in results] == [143, 143], "one was told"
    for key, value in results[0]["straight"]["weights"].items():
        assert all(torch.equal(value, result["continued"]["weights"][key]) for result in results)
    assert results[0]["straight"]["evaluations"] == results[1]["continued"]["evaluations"]


def test_two_processes_match_distributions_as_one(two, pipeline_folder, tmp_path):
    first, second = (result["matched"] for result in two[1])
    one = distributed_run.run(tmp_path, pipeline_folder, 4, **distributed_run.MATCHED)
    for part in ("weights", "fake"):
        assert first[part].keys() == second[part].keys() == one[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), "the processes stay in step"
            torch.testing.assert_close(value, one[part][key], atol=1e-6, rtol=1e-3)
        assert any(value.any() for key, value in first[part].items() if "lora_B" in key), "it has moved"


def test_a_vae_that_makes_nan_on_one_process_stops_both(two):
    folder, results = two
    for early, place in ((True, "before the first epoch"), (False, "epoch 0, step 0")):
        assert results[0]["spoiled", early].startswith(f"{place}: NonFiniteError on another process")
        assert "the VAE (AutoencoderKL, float32) decoded finite latents to NaN" in results[1]["spoiled", early]
        there = {path.name for path in (folder / f"spoiled_{early}").iterdir()}
        assert not there & {"adapter", "pending", "checkpoints"}


def test_two_processes_share_unequal_groups_as_one_does(two, pipeline_folder, tmp_path):
    folder, results = two
    first, second = (result["streaming"] for result in results)
    one = distributed_run.run(tmp_path, pipeline_folder, 4, group_allocation="streaming", min_generations=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sizes = [line["groups/size_max"] for line in lines if "groups/size_max" in line]
    assert len(sizes) == 2 and max(sizes) > 8, "groups did differ"
    log = (folder / "streaming" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["groups/size_max"] for line in log if "groups/size_max" in line] == sizes
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), "the processes stay in step"
    assert [r for _, r in first["curve"]] == pytest.approx([r for _, r in one["curve"]], abs=1e-5)


def test_two_processes_share_the_encoding_of_a_fixed_set_of_prompts(two):
    _, results = two
    assert [result["encoded"] for result in results] == [["one", "three"], ["two"]]
    assert [result["there"] for result in results] == [3, 3], "each waits for the other's share"
