"""Two processes do what one does: the same noise, the same groups, the same update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def launch(folder, model, mode, processes, check=True):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, str(HERE / "distributed_run.py"), str(folder), str(model), mode],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done, [torch.load(path, weights_only=False) for path in sorted(folder.glob("result_*.pt"))]


def test_two_processes_are_one(pipeline_folder, tmp_path):
    _, (one,) = launch(tmp_path / "one", pipeline_folder, "one", 1)
    _, two = launch(tmp_path / "two", pipeline_folder, "two", 2)
    assert [result["world"] for result in two] == [2, 2], "really two processes"
    together = torch.cat([result["final"] for result in two])
    torch.testing.assert_close(together, one["final"], atol=1e-5, rtol=0)
    for key, value in two[0]["weights"].items():
        assert torch.equal(value, two[1]["weights"][key]), "the processes stay in step"
    (_, first), (_, second) = one["curve"]
    assert [r for _, r in two[0]["curve"]] == pytest.approx([first, second], abs=1e-5)
    key = "eval/annealed_2/judge"
    assert two[0]["evaluations"][-1][key] == pytest.approx(one["evaluations"][-1][key], abs=1e-4)
    log = (tmp_path / "two" / "run" / "metrics.jsonl").read_text().splitlines()
    alone = (tmp_path / "one" / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(log) == len(alone), "one process writes the log"


def test_a_reward_that_fails_on_one_process_stops_all_and_loses_nothing(pipeline_folder, tmp_path):
    _, straight = launch(tmp_path / "straight", pipeline_folder, "two", 2)
    done, results = launch(tmp_path / "failed", pipeline_folder, "fail", 2, check=False)
    assert done.returncode != 0 and not results
    assert "ConnectionError: judge is down" in done.stderr and "a reward failed on another process" in done.stderr
    assert len(list((tmp_path / "failed" / "run" / "pending").glob("*.pt"))) == 2
    _, resumed = launch(tmp_path / "failed", pipeline_folder, "resume", 2)
    for key, value in straight[0]["weights"].items():
        assert torch.equal(value, resumed[0]["weights"][key])
