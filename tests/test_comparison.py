"""Evaluating and comparing models: the same noise, resuming, tables, plots, the card."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from hub_stub import HubStub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ROOT

from trl_tafs import cli, evaluate
from trl_tafs.rewards import RewardError
from trl_tafs.scores import read_scores
from trl_tafs.tables import card_results, markdown

TAGS = {"one": "colors", "two": "colors", "three": "counting", "four": "counting", "five": "counting"}
ROWS = [{"prompt": f"a handwritten {name}", "tag": tag} for name, tag in TAGS.items()]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def geneval(images, prompts, metadata):
    """A stand-in of the name: no verdict on the first prompt, then 1 for colors and 0 for counting."""
    return [None if "one" in p else float(row["tag"] == "colors") for p, row in zip(prompts, metadata, strict=True)]


class Counting:
    """Brightness, and how many images were scored; it can be told to fail after some."""

    def __init__(self, failing_after=None):
        self.count, self.failing_after = 0, failing_after

    def __call__(self, images, prompts, metadata):
        if self.failing_after is not None and self.count >= self.failing_after:
            raise RuntimeError("gone")
        self.count += len(prompts)
        return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A trained adapter of the tiny pipeline, made once."""
    folder = tmp_path_factory.mktemp("models")
    tiny.build_pipeline(0).save_pretrained(folder / "base")
    trainer = tiny.trainer(tiny.load(folder / "base"), folder / "run", train_learning_rate=1e-2, num_epochs=1)
    trainer.train()
    return folder / "base", trainer.save_pretrained(folder / "adapter")


@pytest.fixture(scope="module")
def results(adapter, tmp_path_factory):
    """Base and adapter, two samplers, two step counts, two images of five prompts."""
    base, lora = adapter
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    pipeline = tiny.load(base)
    models = {"base": pipeline, "ours": (pipeline, str(lora))}
    options = {"num_steps": [2, 4], "samplers": ["annealed", "ode"], "images_per_prompt": 2, "step_rewards": True}
    found = evaluate(models, ROWS, {"brightness": brightness, "geneval": geneval}, folder, batch_size=4, **options)
    return found, folder


def test_every_model_is_drawn_in_every_way_from_the_same_noise(results):
    found, folder = results
    assert [(r.model, r.sampling.sampler, r.sampling.num_steps) for r in found.rows] == [
        (model, sampler, steps) for sampler in ("annealed", "ode") for steps in (2, 4) for model in ("base", "ours")
    ]
    assert all(row.images == 10 and row.sampling.nfe == row.sampling.num_steps for row in found.rows)
    base, ours = found.rows[0], found.rows[1]
    assert base.metrics["brightness"].mean != ours.metrics["brightness"].mean
    for row in found.rows:
        assert set(row.metrics) >= {"brightness", "geneval", "saturation", "sharpness", "colour_entropy", "diversity"}
    scores = read_scores(folder / "scores" / "base" / "annealed_4_8x8")
    assert sorted(scores) == list(range(10)) and scores[3]["prompt"] == 1
    mean = sum(row["rewards"]["brightness"] for row in scores.values()) / 10
    row = next(r for r in found.rows if r.model == "base" and r.sampling.label == "annealed_4_8x8")
    assert row.metrics["brightness"].mean == pytest.approx(mean)


def test_the_same_model_twice_differs_by_nothing(adapter, tmp_path):
    pipeline = tiny.load(adapter[0])
    found = evaluate(
        {"a": pipeline, "b": pipeline}, ["one", "two", "three"], brightness, tmp_path / "out", batch_size=2
    )
    difference = next(d["estimate"] for d in found.differences if d["metric"] == "brightness")
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_differences_are_paired_and_against_the_first_model(results):
    found, _ = results
    assert {(d["model"], d["baseline"]) for d in found.differences} == {("ours", "base")}
    by = {(r.model, r.sampling.label): r for r in found.rows}
    for d in found.differences:
        first, second = by["base", d["sampling"]].per_prompt, by["ours", d["sampling"]].per_prompt
        pairs = [second[d["metric"]][p] - first[d["metric"]][p] for p in first[d["metric"]]]
        assert d["estimate"].mean == pytest.approx(sum(pairs) / len(pairs))


def test_geneval_is_the_mean_of_its_tasks_whatever_their_sizes(results):
    row = results[0].rows[0]
    assert row.metrics["geneval"].mean == pytest.approx(0.5) and row.metrics["geneval"].count == 4
    assert row.metrics["geneval/colors"].mean == 1.0 and row.metrics["geneval/counting"].mean == 0.0
    assert results[0].names[:3] == ("geneval", "geneval/colors", "geneval/counting")


def test_correlations_of_steps_with_the_last(results):
    found = [c for c in results[0].correlations if c["sampling"] == "annealed_4_8x8" and c["reward"] == "brightness"]
    assert [(c["step"], c["of"]) for c in found] == [(1, 4), (2, 4), (3, 4)] * 2
    assert all(-1 <= c["r"] <= 1 for c in found) and found[2]["r"] > found[0]["r"]


def test_tables_plots_and_grids_are_written(results):
    found, folder = results
    text = (folder / "results.md").read_text()
    assert text == markdown(found)
    assert "| Model | Sampler | Steps | Size | NFE | Images | GenEval | GenEval/colors" in text
    assert "Paired differences" in text and "R^3 with R^4" in text
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert len(rows) == 8 and float(rows[0]["brightness_low"]) <= float(rows[0]["brightness"])
    data = json.loads((folder / "results.json").read_text())
    assert data["rows"][0]["metrics"]["brightness"]["mean"] == found.rows[0].metrics["brightness"].mean
    assert (folder / "steps.png").stat().st_size > 5000
    assert {path.name for path in folder.glob("grid_*.png")} == {
        f"grid_{sampler}_{steps}_8x8.png" for sampler in ("annealed", "ode") for steps in (2, 4)
    }


def test_an_evaluation_goes_on_where_it_stopped(adapter, tmp_path):
    pipeline, prompts = tiny.load(adapter[0]), ["one", "two", "three", "four", "five"]
    whole = evaluate({"base": pipeline}, prompts, {"j": Counting()}, tmp_path / "whole", batch_size=2)
    with pytest.raises(RewardError, match="gone.*what was scored is kept"):
        evaluate({"base": pipeline}, prompts, {"j": Counting(failing_after=2)}, tmp_path / "torn", batch_size=2)
    path = next((tmp_path / "torn").rglob("rank0.jsonl"))
    path.write_text(path.read_text() + '{"sample": 4, "pro')  # a kill in the middle of a line
    judge = Counting()
    resumed = evaluate({"base": pipeline}, prompts, {"j": judge}, tmp_path / "torn", batch_size=2)
    assert judge.count == 3
    assert resumed.rows[0].metrics["j"].mean == pytest.approx(whole.rows[0].metrics["j"].mean, abs=1e-6)
    again = Counting()
    evaluate({"base": pipeline}, prompts, {"j": again}, tmp_path / "torn", batch_size=2)
    assert again.count == 0


def test_another_evaluations_folder_is_refused(adapter, tmp_path):
    pipeline = tiny.load(adapter[0])
    evaluate({"base": pipeline}, ["one"], brightness, tmp_path / "out")
    with pytest.raises(ValueError, match="holds an evaluation with .*'seed': 0.*choose another output_dir"):
        evaluate({"base": pipeline}, ["one"], brightness, tmp_path / "out", seed=1)
    with pytest.raises(ValueError, match="prompts"):
        evaluate({"base": pipeline}, ["two"], brightness, tmp_path / "out")


def test_an_adapter_that_was_trained_anew_is_not_taken_for_the_old_one(adapter, tmp_path):
    pipeline, lora = tiny.load(adapter[0]), tmp_path / "adapter"
    shutil.copytree(adapter[1], lora)
    evaluate({"ours": (pipeline, str(lora))}, ["one"], brightness, tmp_path / "out")
    weights = next(lora.glob("*.safetensors"))
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata=safe_open(weights, "pt").metadata())
    with pytest.raises(ValueError, match="holds an evaluation with .*'adapter'"):
        evaluate({"ours": (pipeline, str(lora))}, ["one"], brightness, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "no models"),
        ({"models": {"a": 3}}, "model 'a' is a int"),
        ({"prompts": []}, "no prompts"),
        ({"samplers": ["dpm"]}, "samplers .*dpm"),
        ({"num_steps": [0]}, "can't work"),
        ({"images_per_prompt": 0}, "must be at least 1"),
        ({"sizes": [(9, 8)]}, "multiples"),
    ],
)
def test_what_cannot_work_is_said_first(pipeline, tmp_path, change, message):
    arguments = {"models": {"base": pipeline}, "prompts": ["one"], "rewards": brightness, "output_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        evaluate(**(arguments | change))


def test_the_command_compares_base_and_adapter(adapter, tmp_path, capsys):
    base, lora = adapter
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    options = ["--pretrained_model", str(base), "--prompts", str(tmp_path / "prompts.txt"), "--dtype", "float32"]
    options += ["--reward", "jpeg_compressibility", "--output_dir", str(tmp_path / "out"), "--max_prompts", "2"]
    assert cli.main(["evaluate", "none", str(lora), *options, "--size", "8x8"]) == 0
    shown = capsys.readouterr().out
    assert "| base | annealed | 4 | 8 x 8 | 4 | 2 |" in shown and "Paired differences" in shown
    assert cli.main(["evaluate", str(lora), *options, "--push"]) == 1
    assert "--push is for adapters on the Hub" in capsys.readouterr().err
    assert cli.main(["evaluate", "none", *options, "--size", "8"]) == 1
    assert "isn't HEIGHTxWIDTH" in capsys.readouterr().err
    assert cli.main(["evaluate", "none", *options, "--reward", "a", "--reward", "b"]) == 1
    assert "--reward is given more than once" in capsys.readouterr().err


PUSH = """
import sys
from trl_tafs.scores import Sampling
from trl_tafs.statistics import Estimate
from trl_tafs.tables import Results, Row, push

def results(value):
    row = Row("user/a", Sampling("annealed", 4, 8, 8, 1.0), 3, {"pickscore": Estimate(value, 20.0, 23.0, 3),
              "sharpness": Estimate(1.0, 1.0, 1.0, 3)}, {})
    return Results([row], [], [], ("pickscore", "sharpness"), {})

for value in (21.0, 22.5):
    print(push(results(value), "user/a", "user/a", "geneval"))
"""


def test_results_are_added_to_the_card_and_replaced_the_next_time(tmp_path):
    with HubStub({"token": "user"}) as hub:
        hub.commit(
            "user/a", "main", {"README.md": b"---\nlibrary_name: diffusers\ntags:\n- lora\n---\n\n# An adapter\n"}
        )
        environment = os.environ | hub.environment(tmp_path / "home", "token") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", PUSH], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        card = hub.files("user/a")["README.md"].decode()
    assert "# An adapter" in card and "- lora" in card and "model-index:" in card
    assert card.count("type: pickscore") == 1 and "value: 22.5" in card and "sharpness" not in card
    assert "PickScore (annealed, 4 steps, 8 x 8, 4 NFE)" in card.replace("\n", " ").replace("          ", " ")


def test_the_cards_results_are_of_one_model_and_its_rewards(results):
    found = card_results(results[0], "ours", "geneval style")
    assert {r.metric_type for r in found} == {"brightness", "geneval", "geneval/colors", "geneval/counting"}
    assert len(found) == 16 and found[0].dataset_type == "geneval_style"
    assert all(math.isfinite(r.metric_value) for r in found)


@pytest.mark.slow
def test_two_processes_find_what_one_does(adapter, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nimport torch; torch.set_num_threads(1)\nimport tiny\n"
        "from trl_tafs import evaluate\n"
        "evaluate({'base': tiny.load(sys.argv[2])}, [f'p {i}' for i in range(7)], tiny.brightness, sys.argv[3],\n"
        "         batch_size=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--main_process_port", "0", str(script), str(ROOT / "tests"), str(adapter[0])]
        done = subprocess.run(
            [*command, str(tmp_path / str(processes))], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_scores(tmp_path / n / "scores" / "base" / "annealed_4_8x8") for n in ("1", "2"))
    assert len(list((tmp_path / "2").rglob("rank*.jsonl"))) == 2 and sorted(one) == sorted(two) == list(range(7))
    for i in one:
        assert one[i]["rewards"]["brightness"] == pytest.approx(two[i]["rewards"]["brightness"], abs=1e-6)
