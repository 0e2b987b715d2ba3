"""Evaluating and comparing models: the same noise, resuming, tables, plots, the card."""

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import families
import pytest
import tiny
import torch
from hub_stub import HubStub
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ROOT

from trl_tafs import evaluate
from trl_tafs.cli.evaluate import evaluate as evaluate_command
from trl_tafs.cli.main import main
from trl_tafs.evaluation import compare as comparison
from trl_tafs.evaluation.drawing import DrawSpec
from trl_tafs.evaluation.results import ResultRow, Results
from trl_tafs.evaluation.scores import read_scores
from trl_tafs.evaluation.statistics import Estimate
from trl_tafs.evaluation.tables import markdown
from trl_tafs.hub.results import card_results, push
from trl_tafs.policy.adapter_file import WEIGHT_NAME
from trl_tafs.policy.fingerprint import fingerprint
from trl_tafs.rewards import RewardError, RewardSet, loading

TAGS = {"one": "colors", "two": "colors", "three": "counting", "four": "counting", "five": "counting"}
ROWS = [{"prompt": f"a handwritten {name}", "tag": tag} for name, tag in TAGS.items()]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def geneval(images, prompts, metadata):
    """A stand-in of the name: no score on the first prompt, then 1 for colors and 0 for counting."""
    return [None if "one" in p else float(row["tag"] == "colors") for p, row in zip(prompts, metadata, strict=True)]


def judge(name, options, images, prompts, metadata):
    """What stands for a reward by its name, with the options that it was made with."""
    return images.mean((1, 2, 3))


geneval.title = "GenEval"


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


def test_a_reward_names_its_column_unless_two_share_the_name():
    class Judge:
        title = "Judge"

        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    assert RewardSet({"a": Judge(), "b": brightness}).titles == {"a": "Judge"}
    assert RewardSet({"a": Judge(), "b": Judge()}).titles == {}


def test_geneval_is_the_mean_of_its_tasks_whatever_their_sizes(results):
    row = results[0].rows[0]
    assert row.metrics["geneval"].mean == pytest.approx(0.5) and row.metrics["geneval"].count == 4
    assert row.metrics["geneval/colors"].mean == 1.0 and row.metrics["geneval/counting"].mean == 0.0
    assert results[0].names[:4] == ("brightness", "geneval", "geneval/colors", "geneval/counting")


def test_correlations_of_steps_with_the_last(results):
    found = [c for c in results[0].correlations if c["sampling"] == "annealed_4_8x8" and c["reward"] == "brightness"]
    assert [(c["step"], c["of"]) for c in found] == [(1, 4), (2, 4), (3, 4)] * 2
    assert all(-1 <= c["r"] <= 1 for c in found) and found[2]["r"] > found[0]["r"]


def test_tables_plots_and_grids_are_written(results):
    found, folder = results
    text = (folder / "results.md").read_text()
    assert text == markdown(found)
    assert "| Model | Sampler | Steps | Size | NFE | Images | brightness | GenEval | GenEval/colors" in text
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
    ("change", "said"),
    [
        ({"negative_prompt": "blurry"}, "'negative_prompt': ''.*'negative_prompt': 'blurry'"),
        ({"max_sequence_length": 4}, "'max_sequence_length': None.*'max_sequence_length': 4"),
        ({"reward_options": {"brightness": {"scale": 2}}}, "'reward_options': {}.*'scale': 2"),
    ],
)
def test_scores_of_other_prompts_or_rewards_are_not_taken_over(adapter, tmp_path, change, said):
    models, usual = {"base": tiny.load(adapter[0])}, {"guidance_scale": 2.0, "num_steps": [2]}
    evaluate(models, ["one"], brightness, tmp_path / "out", **usual)
    evaluate(models, ["one"], brightness, tmp_path / "out", **usual, negative_prompt=None)  # the empty one, too
    with pytest.raises(ValueError, match=f"holds an evaluation with .*{said}.*choose another output_dir"):
        evaluate(models, ["one"], brightness, tmp_path / "out", **(usual | change))


def test_scores_of_another_base_are_not_taken_over(adapter, tmp_path):
    def run(pipeline):
        return evaluate({"base": pipeline}, ["one"], brightness, tmp_path / "out", num_steps=[2])

    run(tiny.load(adapter[0]))
    run(tiny.load(os.path.relpath(adapter[0])))  # the same folder by another name
    shutil.copytree(adapter[0], tmp_path / "other")
    others = {key: tiny.load(adapter[0]) for key in ("dtype", "revision", "quantized")}
    others["base"] = tiny.load(tmp_path / "other")
    others["dtype"].transformer.to(torch.bfloat16)
    others["revision"].base_revision = "v2"
    others["quantized"].transformer.is_quantized = True
    for key, pipeline in others.items():
        with pytest.raises(ValueError, match=f"holds an evaluation with {{'{key}': .*choose another output_dir"):
            run(pipeline)


def test_an_older_folder_that_says_less_is_refused(adapter, tmp_path):
    def run():
        return evaluate({"base": tiny.load(adapter[0])}, ["one"], brightness, tmp_path / "out", num_steps=[2])

    run()
    for path, kept in (("scores/base", {"adapter"}), (".", {"prompts", "images_per_prompt", "seed", "rewards"})):
        path = tmp_path / "out" / path / "evaluation.json"
        identity = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in identity.items() if key in kept}))
        with pytest.raises(ValueError, match="choose another output_dir"):
            run()
        path.write_text(json.dumps(identity))
    run()


def test_an_adapter_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    with HubStub({"token": "user"}) as hub:
        hub.connect(monkeypatch, tmp_path / "home", "token")
        first = hub.commit("user/a", "main", {WEIGHT_NAME: b"first"})
        hub.failing = {("GET", "/api/models"): 503}
        assert fingerprint("user/a") == "user/a", "nothing is known of it"
        hub.failing = {}
        hf_hub_download("user/a", WEIGHT_NAME)
        assert fingerprint("user/a") == first
        second = hub.commit("user/a", "main", {WEIGHT_NAME: b"second"})
        assert fingerprint("user/a") == second
        hub.failing = {("GET", "/api/models"): 503}
        assert fingerprint("user/a") == first, "what is in the cache, and would be loaded without the Hub"
        hub.failing = {}
        assert fingerprint("no/such/name") == "no/such/name"


def test_each_prompt_is_encoded_once_for_all_ways_of_drawing(adapter, tmp_path, monkeypatch):
    pipeline, encoded, moves = tiny.load(adapter[0]), [], []
    embed, move = pipeline.embed, pipeline.text_encoder.to
    monkeypatch.setattr(
        pipeline, "embed", lambda prompts, *args, **kw: encoded.extend(prompts) or embed(prompts, *args)
    )
    monkeypatch.setattr(pipeline.text_encoder, "to", lambda device: moves.append(device) or move(device))
    prompts = [f"the {i}" for i in range(6)]
    ways = {"num_steps": [2, 3], "samplers": ["annealed", "ode"], "sizes": [(8, 8), (8, 16)], "images_per_prompt": 2}
    options = {"batch_size": 2, "offload_text_encoders": True}
    found = evaluate({"base": pipeline}, prompts, brightness, tmp_path / "out", **ways, **options)
    assert len(found.rows) == 8 and encoded == prompts
    assert len(moves) == 3, "away at first, to the device and away again"


def test_more_prompts_than_are_encoded_at_once_are_all_kept(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "ENCODED_AT_ONCE", 2)
    pipeline, encoded = tiny.load(adapter[0]), []
    embed = pipeline.embed
    monkeypatch.setattr(
        pipeline, "embed", lambda prompts, *args, **kw: encoded.extend(prompts) or embed(prompts, *args)
    )
    prompts = ["one", "two", "three", "one", "four", "five"]
    evaluate({"base": pipeline}, prompts, brightness, tmp_path / "out", num_steps=[2, 3])
    assert encoded == ["one", "two", "three", "four", "five"]


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
        ({"embedded_guidance_scale": 3.5}, "embedded_guidance_scale is 3.5, and this SD3.* takes no guidance"),
        ({"max_sequence_length": 513}, "max_sequence_length is 513"),
    ],
)
def test_what_cannot_work_is_said_first(pipeline, tmp_path, change, message):
    arguments = {"models": {"base": pipeline}, "prompts": ["one"], "rewards": brightness, "output_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        evaluate(**(arguments | change))
    assert not list(tmp_path.iterdir()), "and nothing is written"


def test_the_command_tells_guidance_that_is_embedded_and_the_negative_prompt(tmp_path, capsys):
    families.stock("flux-dev").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = ["--pretrained_model", str(tmp_path / "base"), "--prompts", str(tmp_path / "prompts.txt")]
    options += ["--dtype", "float32", "--reward", "jpeg_compressibility", "--num_steps", "2", "--size", "16x16"]
    labels = {
        "annealed_2_16x16": [],
        "annealed_2_16x16_embedded7": ["--embedded_guidance_scale", "7"],
        "annealed_2_16x16_guidance3": ["--guidance_scale", "3"],
        "annealed_2_16x16_guidance3_embedded7": ["--guidance_scale", "3", "--embedded_guidance_scale", "7"],
    }
    pictures = {}
    for label, given in labels.items():
        folder = tmp_path / label
        assert main(["evaluate", "none", *options, *given, "--output_dir", str(folder)]) == 0, given
        pictures[label] = (folder / "scores" / "base" / label / "0.png").read_bytes()
    negative = ["--guidance_scale", "3", "--negative_prompt", "a red dog", "--max_sequence_length", "16"]
    assert main(["evaluate", "none", *options, *negative, "--output_dir", str(tmp_path / "negative")]) == 0
    pictures["negative"] = (tmp_path / "negative/scores/base/annealed_2_16x16_guidance3/0.png").read_bytes()
    assert len(set(pictures.values())) == 5
    said = json.loads((tmp_path / "negative" / "evaluation.json").read_text())
    assert (said["negative_prompt"], said["max_sequence_length"]) == ("a red dog", 16)
    assert main(["evaluate", "none", *options, "--negative_prompt", "a red dog"]) == 1
    assert "--negative_prompt is 'a red dog', and without guidance it has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("weight", ["", "=1", "=1.0"])
def test_benchmarks_are_scored_as_the_papers_do_whatever_weight_is_given(weight, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_reward", lambda name, options=None: partial(judge, name, options))
    (tmp_path / "prompts.txt").write_text("one\n")
    names = ["geneval", "clip_score", "pickscore"]
    command = ["none", "--pretrained_model", "base", "--prompts", str(tmp_path / "prompts.txt"), "--reward"]
    for given, scale in ({}, 100.0), ({"clip_score": {"scale": 1.0}}, 1.0):
        options = [name + weight for name in names] + ["--reward_options", json.dumps(given)]
        arguments = evaluate_command([*command, *options]).args[1]
        found = {name: reward.args[1] or {} for name, (reward, _) in arguments["rewards"].items()}
        expected = {"geneval": {"graded": False}, "clip_score": {"scale": scale}}
        assert found == expected | {"pickscore": {}} and arguments["reward_options"] == expected
    (tmp_path / "mine.py").write_text(
        "def geneval(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n\n"
        "class Sharp:\n    title, evaluation_options = 'Sharpness', {'strict': True}\n"
    )
    own = evaluate_command([*command, f"{tmp_path}/mine.py:geneval{weight}"]).args[1]
    assert own["reward_options"] == {}, "a reward of one's own of that name takes what it takes"
    own = evaluate_command([*command, f"{tmp_path}/mine.py:Sharp{weight}"]).args[1]
    assert own["reward_options"] == {"Sharp": {"strict": True}}, "and one that says how it is evaluated is made so"


def test_the_command_compares_base_and_adapter(adapter, tmp_path, capsys):
    base, lora = adapter
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    options = ["--pretrained_model", str(base), "--prompts", str(tmp_path / "prompts.txt"), "--dtype", "float32"]
    options += ["--reward", "jpeg_compressibility", "--output_dir", str(tmp_path / "out"), "--max_prompts", "2"]
    assert main(["evaluate", "none", str(lora), *options, "--size", "8x8"]) == 0
    shown = capsys.readouterr().out
    assert "| base | annealed | 4 | 8 x 8 | 4 | 2 |" in shown and "Paired differences" in shown
    assert main(["evaluate", str(lora), *options, "--push"]) == 1
    assert "--push is for adapters on the Hub" in capsys.readouterr().err
    assert main(["evaluate", "none", *options, "--size", "8"]) == 1
    assert "isn't HEIGHTxWIDTH" in capsys.readouterr().err
    assert main(["evaluate", "none", *options, "--reward", "a", "--reward", "b"]) == 1
    assert "--reward is given more than once" in capsys.readouterr().err


def test_results_are_added_to_the_card_and_replaced_the_next_time(tmp_path, monkeypatch):
    def found(value):
        scores = {"pickscore": Estimate(value, 20.0, 23.0, 3), "sharpness": Estimate(1.0, 1.0, 1.0, 3)}
        row = ResultRow("user/a", DrawSpec("annealed", 4, 8, 8), 3, scores, {})
        return Results([row], [], [], ("pickscore", "sharpness"), {}, titles={"pickscore": "PickScore"})

    head = b"---\nlibrary_name: diffusers\ntags:\n- lora\n---\n\n# An adapter\n"
    with HubStub({"token": "user"}) as hub:
        hub.connect(monkeypatch, tmp_path / "home", "token")
        hub.commit("user/a", "main", {"README.md": head})
        for value in (21.0, 22.5):
            push(found(value), "user/a", "user/a", "geneval")
        card = hub.files("user/a")["README.md"].decode()
    assert "# An adapter" in card and "- lora" in card and "model-index:" in card
    assert card.count("type: pickscore") == 1 and "value: 22.5" in card and "sharpness" not in card
    assert "PickScore (annealed, 4 steps, 8 x 8, 4 NFE)" in card.replace("\n", " ").replace("          ", " ")


def test_the_cards_results_are_of_one_model_and_its_rewards(results):
    found = card_results(results[0], "ours", "geneval style")
    assert {r.metric_type for r in found} == {"brightness", "geneval", "geneval/colors", "geneval/counting"}
    assert len(found) == 16 and found[0].dataset_type == "geneval_style"
    assert all(math.isfinite(r.metric_value) for r in found)
    row = results[0].rows[0]
    guided = dataclasses.replace(row, sampling=dataclasses.replace(row.sampling, embedded_guidance_scale=3.5))
    shown = card_results(dataclasses.replace(results[0], rows=[guided]), "base", "geneval")[0]
    assert shown.metric_name.endswith("NFE, embedded guidance 3.5)") and shown.dataset_config.endswith("_embedded3.5")


@pytest.mark.slow
def test_two_processes_find_what_one_does(adapter, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nimport torch; torch.set_num_threads(1)\nimport tiny\n"
        "from trl_tafs import evaluate\n"
        "evaluate({'base': tiny.load(sys.argv[2])}, [f'p {i}' for i in range(7)], tiny.brightness, sys.argv[3],\n"
        "         batch_size=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        command += [str(script), str(ROOT / "tests"), str(adapter[0])]
        done = subprocess.run(
            [*command, str(tmp_path / str(processes))], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_scores(tmp_path / n / "scores" / "base" / "annealed_4_8x8") for n in ("1", "2"))
    assert len(list((tmp_path / "2").rglob("rank*.jsonl"))) == 2 and sorted(one) == sorted(two) == list(range(7))
    for i in one:
        assert one[i]["rewards"]["brightness"] == pytest.approx(two[i]["rewards"]["brightness"], abs=1e-6)
