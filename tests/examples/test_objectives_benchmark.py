"""The benchmark of objectives by size: its arithmetic, its judges, a run of an epoch."""

import json
import sys

import pytest
import torch
from tiny import ROOT

sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import objectives  # noqa: E402
from tasks import TASKS  # noqa: E402

FULL = {"reward": 0.5, "held_out": 0.4, "frechet": 3.0, "saturated": 0.01}


def kept(runs, call, found):
    runs._path(call).write_text(json.dumps(found))


def test_a_rate_is_chosen_by_what_is_not_reported_and_the_table_has_each_seed(tmp_path):
    runs = objectives.Runs(tmp_path, 1)
    name, other = "tafs", "tafs, no KL"
    for rate, value in ((1e-3, 0.9), (3e-3, 0.7), (1e-2, 0.1)):
        call = (objectives.run, "digits", objectives.SETTINGS[name], rate, objectives.CHOICE_SEED, (16,), False)
        kept(runs, call, {"at": {"16": {"choice": value}}})
    for setting, epochs in ((name, 16), (other, 19)):
        for seed, reward in ((0, 0.8), (1, 0.6)):
            rows = {str(n): FULL | {"reward": reward + n / 100} for n in objectives.STEPS}
            call = (objectives.run, "digits", objectives.SETTINGS[setting], 1e-3, seed, (epochs,), True)
            kept(runs, call, {"at": {str(epochs): rows}, "updates": epochs})
    kept(runs, (objectives.base, "digits"), {str(n): FULL for n in objectives.STEPS})
    told = objectives.table(runs, ["digits"], [name, other], [0, 1])["digits"]
    assert told[name]["rate"] == told[other]["rate"] == 1e-3, "the best by its choice, and of what it is tuned as"
    assert told[name]["4"]["reward"] == pytest.approx(0.74) and told[name]["4"]["seeds"] == pytest.approx([0.84, 0.64])
    assert told["base"]["8"]["frechet"] == 3.0


def test_the_brake_reports_each_rate_at_both_lengths(tmp_path):
    runs, setting = objectives.Runs(tmp_path, 1), objectives.SETTINGS["tafs"]
    kept(runs, (objectives.base, "words"), {str(n): FULL for n in objectives.STEPS})
    for rate in (1e-3, 1e-2):
        rows = {str(e): {str(n): FULL | {"reward": 100 * rate + e / 1000} for n in (2, 4, 8)} for e in (16, 64)}
        kept(runs, (objectives.run, "words", setting, rate, 0, (16, 64), True), {"at": rows, "updates": 64})
    told = objectives.brake(runs, ["words"], ["tafs"], [1e-3, 1e-2], [0])["words"]
    assert told["tafs, 0.001"]["1 x"]["4"]["reward"] == pytest.approx(0.116)
    assert told["tafs, 0.01"]["4 x"]["8"]["reward"] == pytest.approx(1.064)


def test_shares_of_clipped_actions_are_the_log_s_means(tmp_path):
    lines = [{"clipfrac_positive": p, "clipfrac_negative": n} for p, n in ((0.1, 0.5), (0.3, 0.1))] + [{"reward": 1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = objectives.clipped_shares(tmp_path / "metrics.jsonl")
    assert told == {"clipfrac_positive": 0.2, "clipfrac_negative": 0.3}
    assert objectives.clipped_shares(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("name", ["digits", "words", "large"])
def test_true_images_are_near_and_burnt_ones_are_told(name):
    task = TASKS[name]()
    real = task.real()
    images = real[: len(task.prompts)] if name != "digits" else real
    if name == "digits":
        task.labels = torch.tensor([i % 10 for i in range(len(images))])  # of the reference's own kinds
    burnt = ((images - 0.5) * 10 + 0.5).clamp(0, 1)
    assert task.saturated(burnt) > task.saturated(images) + 0.05
    assert abs(task.saturated(images)) < 0.02
    assert task.frechet(burnt) > 3 * task.frechet(images)


def test_a_run_is_judged_at_2_4_and_8_steps_or_for_the_choice_by_other_noise():
    options = {"sample_num_batches_per_epoch": 1, "sample_batch_size": 64}
    setting = {"preset": "tafs", "options": options | {"train_batch_size": 64}}
    told = objectives.run("digits", setting, 1e-3, 0, (1,), True)
    assert set(told["at"]["1"]) == {"2", "4", "8"} and told["updates"] == 1
    assert {"reward", "held_out", "frechet", "saturated"} <= set(told["at"]["1"]["4"])
    choice = objectives.run("digits", setting, 1e-3, 0, (1,), False)["at"]["1"]
    assert set(choice) == {"choice"}
    assert choice["choice"] != told["at"]["1"]["4"]["reward"], "other noise"


def test_an_action_of_noise_is_spread_as_noise_is_and_one_with_structure_wider():
    noise, structure = (objectives.spread("digits", preset, updates=1) for preset in ("tafs_annealed", "tafs"))
    assert noise["cosine"] == pytest.approx(64**-0.5, rel=0.2)
    assert structure["cosine"] > 1.5 * noise["cosine"]
    assert structure["log_ratio"] > 0 and structure["drift"] > 0
