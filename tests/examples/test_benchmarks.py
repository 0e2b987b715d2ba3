"""The benchmark of methods: its arithmetic here, a short run of it among the slow tests."""

import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT

BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_run  # noqa: E402
import intervals  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
from tasks import TASKS  # noqa: E402

TAFS = {"preset": "tafs", "options": {}, "rate": 1e-3}


def run_of(value, ode=0.1, seconds_per_epoch=1.0, nfe=4, **more):
    def row(reward):
        judged = {"reward": reward, "held_out": value, "ocr": value, "fidelity": 5.0, "diversity": 1.0}
        return judged | {"values": [reward - 0.01, reward + 0.01] * 50}

    rows = {f"annealed {n}": row(value) for n in (2, 4, 8)} | {f"ode {n}": row(ode) for n in (2, 4, 8)}
    at = {"evaluations": 100, "epochs": 10, "updates": 20, "rows": rows, "best": max(value, ode)}
    curve = [{"epochs": n, "value": v} for n, v in ((0, 0.2), (10, value))]
    told = {"at_time": at, "at_evaluations": at, "curve": curve, "seconds_per_epoch": seconds_per_epoch, "seed": 0}
    return told | {"nfe": {"rollout": nfe, "policy": 3.0, "decodes": 3.0}, "budget": 10.0} | more


def test_tables_are_made_of_the_runs(tmp_path):
    methods = {
        "tafs": [run_of(0.8), run_of(0.9)],
        "tafs_without_annealing": [run_of(0.5), run_of(0.51)],
        "flow_grpo": [run_of(0.3, ode=0.6, seconds_per_epoch=2.5, nfe=10)] * 2,
    }
    rates = {"tafs": 1e-3, "tafs_without_annealing": 1e-3, "flow_grpo": 3e-4}
    guided = {"4": run_of(0.7)["at_time"]["rows"]["ode 4"] | {"sampler": "ode", "guidance": 3.0, "evaluations": 8}}
    results = {"digits": {"rates": rates, "methods": methods, "guided": guided}, "table_4": {"3": methods["tafs"]}}
    (tmp_path / "benchmarks.md").write_text(f"# Benchmarks\n\nBy hand.\n\n{report.BEGIN}\nold\n{report.END}\n")
    report.write(results, tmp_path, "the command", [0, 1])
    told = json.loads((tmp_path / "results" / "methods.json").read_text())
    tafs, flow = (told["presets"][name]["digits"] for name in ("tafs", "flow_grpo"))
    assert tafs["at_time"]["4"]["reward"] == [0.8, 0.9] and tafs["updates"] == 20, "each seed is kept"
    assert flow["at_time"]["4"]["reward"] == [0.6, 0.6], "by the sampler that suits it"
    assert (flow["time_ratio"], flow["nfe"]["rollout"], flow["rate"]) == (2.5, 10, 3e-4)
    assert told["command"] == "the command" and told["seeds"] == [0, 1] and "torch" in told["versions"]
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("# Benchmarks\n\nBy hand.\n") and "old\n" not in page
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert lines[0].startswith("| `tafs`") and "(.800 .900)" in lines[0], "the best first"
    assert "base, 4 guided ode steps, scale 3: 8 evaluations" in page
    assert any(line.startswith("| annealing instead of an SDE") and "`tafs`" in line for line in page.splitlines())
    for picture in ("methods_curves.png", "methods_steps.png"):
        assert (tmp_path / "results" / picture).stat().st_size > 0 and picture in page


def test_an_interval_holds_the_seeds_and_the_images_parts():
    wide = intervals.interval([[0.0, 1.0] * 50, [0.0, 1.0] * 50])  # seeds agree, images don't
    assert wide.mean == 0.5 and wide.half == pytest.approx(1.984 * (0.2525 / 99.99) ** 0.5, rel=0.02)
    far = intervals.interval([[0.4] * 100, [0.6] * 100, [0.5] * 100])  # images agree, seeds don't
    assert far.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3), "Student's t of two degrees of freedom"
    assert intervals.interval([[0.4] * 100]).half == 0.0


def test_a_difference_is_paired_by_image():
    hard, easy = [0.0, 1.0] * 50, [0.1, 1.1] * 50
    gain = intervals.difference([easy] * 3, [hard] * 3)
    assert gain.mean == pytest.approx(0.1) and gain.half < 1e-6, "what images share doesn't count"
    assert (
        intervals.verdict(gain) == "helps"
        and intervals.verdict(intervals.difference([hard] * 3, [easy] * 3)) == "harms"
    )
    noisy = intervals.difference([[0.4] * 9, [0.6] * 9], [[0.45] * 9, [0.5] * 9])
    assert intervals.verdict(noisy) == "can't be told"


def test_presets_take_one_update_an_epoch_and_once_more_their_sources():
    assert methods.METHODS["mix_grpo"]["options"] == {"train_updates_per_epoch": 1}
    assert methods.METHODS["mix_grpo, 4 updates"] == {"preset": "mix_grpo", "options": {}}
    assert "tafs, 1 updates" not in methods.METHODS and methods.METHODS["tafs"]["options"] == {}
    assert {name for pairs in report.IDEAS.values() for pair in pairs for name in pair} <= methods.METHODS.keys()


def test_a_run_counts_evaluations_by_phase_and_stops_at_its_budgets():
    told = bench_run.run("digits", TAFS | {"options": {"beta": 0.1}}, 1, 2, 5000)
    expected = {"rollout": 4.0, "policy": 3.0, "other": 3.0, "decodes": 3.0}
    assert told["nfe"] == expected, "4 to draw, 3 to train, 3 for the KL's base, 3 that are scored"
    assert told["at_time"]["updates"] == 2
    assert (told["at_time"]["epochs"], told["at_time"]["evaluations"]) == (2, 2 * 192 * 10), "judging isn't counted"
    assert (told["at_evaluations"]["epochs"], told["at_evaluations"]["evaluations"]) == (3, 3 * 192 * 10)
    assert [point["epochs"] for point in told["curve"]] == [0, 1, 2]


def test_a_preset_s_optimizer_steps_are_taken_of_a_task_s_one_minibatch(tmp_path):
    for name, updates in (("mix_grpo", 4), ("flow_grpo", 2)):
        trainer = bench_run.make_trainer(
            TASKS["digits"](), {"preset": name, "options": {}, "rate": 1e-3}, 0, str(tmp_path)
        )
        assert trainer.plan.updates_per_inner_epoch == updates and trainer.plan.images_per_update == 192 // updates


@pytest.mark.parametrize("name", TASKS)
def test_every_task_judges_its_own_images(name):
    task = TASKS[name]()
    values = task.judge(task.images(task.pipeline(), "annealed", 4))
    assert {"reward", "held_out", "fidelity", "diversity"} <= set(values)
    assert (
        0.2 < values["reward"] < 0.7
        and abs(task.quick(task.images(task.pipeline(), "annealed", 4)) - values["reward"]) < 1e-6
    )


def test_the_mixed_task_has_prompts_that_teach_nothing():
    task = TASKS["mixed"]()
    reward = task.rewards()["reward"]
    images = task.images(task.pipeline(), "annealed", 4)[:9]
    prompts, metadata = zip(*task.train_prompts[:9], strict=True)
    values = reward(images, list(prompts), list(metadata))
    kinds = [m["kind"] for m in metadata]
    assert {v for v, k in zip(values, kinds, strict=True) if k == "solved"} == {1.0}
    assert {v for v, k in zip(values, kinds, strict=True) if k == "hopeless"} == {0.0}
    assert len(set(prompts)) == 9, "the tracker tells them apart"


@pytest.mark.slow
def test_quick_benchmark_ranks_what_is_robust(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "methods.py"), "--quick", "--jobs", "2"]
    command += ["--methods", "tafs", "tafs_sum", "flow_grpo", "base"]
    done = subprocess.run(
        [*command, "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "results" / "methods.json").read_text())["presets"]
    reward = {name: row["digits"]["at_time"]["4"]["reward"][0] for name, row in told.items()}
    assert reward["tafs"] > reward["flow_grpo"] + 0.1, "ten SDE steps at equal time"
    assert min(reward["tafs"], reward["tafs_sum"]) > reward["base"] + 0.1, "both readings of the credit learn"
    assert abs(reward["base"] - 0.46) < 0.06, "what doesn't move doesn't learn"
