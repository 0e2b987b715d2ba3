"""The third embedded default: what it draws, what its captions ask, who judges it, and that its scripts run."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripts import run_script
from tiny import ROOT

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "scenes"), str(EXAMPLES / "words")]

import scenes_components  # noqa: E402
import scenes_data as data  # noqa: E402
import scenes_geneval  # noqa: E402
import scenes_judges as judges  # noqa: E402
import scenes_pretrain  # noqa: E402
import scenes_report  # noqa: E402
import words_pretrain  # noqa: E402
import words_sampling  # noqa: E402
from scenes_data import CELL, GRID, KINDS, TAGS, Icon, render  # noqa: E402
from words_sampling import encode_prompts  # noqa: E402

from trl_tafs import TAFSStableDiffusion3Pipeline  # noqa: E402
from trl_tafs.prompts.files import read_prompt_file  # noqa: E402

DETECTORS = {"contours": judges.contours, "cells": judges.cells}
GROUND = (0.95, 0.93, 0.97)
PROMPTS = data.held_out_prompts() + data.training_prompts(16)


@pytest.fixture(scope="module")
def true_scenes():
    return data.true_scenes(PROMPTS, 0)


def scores(icons, row, detector):
    image = render(icons, GROUND)[None]
    return judges.verdict(judges.to_uint8(image)[0], row, DETECTORS[detector])


# Data ---------------------------------------------------------------------------------------------------------


def test_pre_training_and_training_never_see_what_is_held_out():
    rng = random.Random(0)
    scenes = [data.draw_scene(tag, rng)[0] for tag in TAGS for _ in range(300)]
    assert not any(data.held_out(icons) for icons in scenes)
    held, trained = {text for text, _ in data.held_out_prompts()}, {text for text, _ in data.training_prompts()}
    alone = {text for text, row in data.held_out_prompts() if row["tag"] == "single_object"}
    assert held & trained == alone  # eight kinds have no combination
    assert len(trained) > 240 and [row["tag"] for _, row in data.held_out_prompts()].count("counting") == 16


@pytest.mark.parametrize("tag", [tag for tag in TAGS if tag != "single_object"])
def test_every_held_out_prompt_asks_for_something_held_out(tag, true_scenes):
    asked = [icons for (_, row), icons in zip(PROMPTS[:96], true_scenes[1], strict=False) if row["tag"] == tag]
    assert len(asked) == 16 and all(data.held_out(icons) for icons in asked)


def test_a_drawn_scene_is_what_its_caption_asks():
    rng = random.Random(1)
    for tag in TAGS * 20:
        icons, _, row = data.draw_scene(tag, rng)
        assert row["tag"] == tag and scores(icons, row, "cells") == (1.0, 1.0)


def test_stated_shares_of_the_captions_are_vague_wrong_or_empty(monkeypatch):
    told = [data.draw_scene(tag, random.Random(k))[:2] for k, tag in enumerate(TAGS * 100)]
    left = iter(range(10**6))

    def scene(tag, rng):
        return (*told[next(left) % 600], {})

    monkeypatch.setattr(data, "draw_scene", scene)
    monkeypatch.setattr(data, "render", lambda icons, ground: icons)
    monkeypatch.setattr(torch, "stack", lambda scenes: scenes)
    scenes, captions = data.training_batch(4000, random.Random(0))
    whole = {tuple(icons): caption for icons, caption in told}
    flawed = [caption not in ("", whole[tuple(icons)]) for icons, caption in zip(scenes, captions, strict=True)]
    assert captions.count("") / 4000 == pytest.approx(data.EMPTY, abs=0.02)
    # of vague captions, those of a single object whose colour nobody asked are whole
    most = (data.WRONG + data.VAGUE) * (1 - data.EMPTY)
    assert data.WRONG <= 0.1 and 0.6 * most < sum(flawed) / 4000 < 1.05 * most


def test_answers_are_what_a_caption_says():
    kinds, colours, relations = len(KINDS), len(data.COLOURS), len(data.RELATIONS)
    star, ring, red, blue = KINDS.index("star"), KINDS.index("ring"), 0, list(data.COLOURS).index("blue")
    for (_, row), expected in (
        (data.single("star"), [star, colours, 0, kinds, colours, relations]),
        (data.counted("star", 3), [star, colours, 2, kinds, colours, relations]),
        (data.coloured("star", "red"), [star, red, 0, kinds, colours, relations]),
        (data.placed("star", "below", "ring"), [ring, colours, 0, star, colours, 3]),  # as GenEval's rows
        (data.two_coloured(("star", "red"), ("ring", "blue")), [star, red, 0, ring, blue, relations]),
    ):
        assert data.answers(row) == expected
    every = [data.answers(row) for _, row in PROMPTS]
    assert len({(text, *told) for (text, _), told in zip(PROMPTS, every, strict=True)}) == len({t for t, _ in PROMPTS})
    assert all(0 <= told < size for row in every for told, size in zip(row, data.QUESTIONS, strict=True))


def test_text_encoders_learn_to_tell_what_captions_say():
    """Also by the transformer's own inputs, which its weights don't change."""
    pipeline = scenes_components.build_pipeline(num_layers=1, num_heads=2, head_dim=8, text_width=32, vae_channels=2)
    before = [p.clone() for p in pipeline.transformer.parameters()]
    told = [scenes_pretrain.train_text(pipeline, random.Random(0), steps, batch=32, rate=3e-3) for steps in (1, 150)]
    assert told[1] > told[0] + 0.25
    assert all(torch.equal(a, b) for a, b in zip(before, pipeline.transformer.parameters(), strict=True))


def test_icons_lie_inside_their_cells_and_cells_on_the_patches():
    assert CELL % data.PATCH == 0 and GRID * CELL == data.SIDE
    for kind in KINDS:
        for radius in data.RADII:
            mask = data.coverage(kind, radius)
            assert mask.max() == 1 and mask[0].max() < 0.35 and mask[-1].max() < 0.35  # anti-aliased, not cut
            assert mask[:, 0].max() < 0.35 and mask[:, -1].max() < 0.35
            assert kind in ("square", "cross") or 8 < ((mask > 0.05) & (mask < 0.95)).sum()


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(0, 1, ["left of"]), (3, 1, ["below"]), (1, 2, ["right of", "above"])]
)
def test_relations_are_as_genevals_rules_see_them(first, second, expected):
    assert data.relation_of(first, second) == expected
    for name in data.RELATIONS:
        row = data.placed("star", name, "ring")[1]
        strict = scores([Icon("star", "red", first), Icon("ring", "blue", second)], row, "cells")[0]
        assert strict == (name in expected)


def test_captions_are_tokenized_whole_and_differently():
    pipeline = scenes_components.build_pipeline()
    texts = list(dict.fromkeys(text for text, _ in PROMPTS))
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_3):
        tokens = [tuple(tokenizer(text).input_ids) for text in texts]
        assert len(set(tokens)) == len(texts) and max(map(len, tokens)) <= scenes_components.MAX_LENGTH
        assert len(tokenizer("an orange star").input_ids) - len(tokenizer("star").input_ids) == 2


def test_each_word_that_the_transformer_reads_knows_of_the_others():
    """By CLIP, too, of which diffusers takes the last state but one: of one layer, words that know of none."""
    tokens, _ = encode_prompts(scenes_components.build_pipeline(), ["a red star", "a blue star"])
    length, star = scenes_components.MAX_LENGTH, 3  # after the start, "a" and the colour
    width = scenes_components.build_pipeline().text_encoder.config.hidden_size
    for clip in (tokens[:, star, :width], tokens[:, star, width : 2 * width]):
        assert not torch.allclose(clip[0], clip[1], rtol=1e-4)
    assert not torch.allclose(*tokens[:, length + star - 1], rtol=1e-4)  # T5 has no start


def test_pre_training_and_sampling_shift_levels_as_the_trainer_does(monkeypatch):
    pipeline = scenes_components.build_pipeline(num_layers=1, num_heads=2, head_dim=8, text_width=8, vae_channels=2)
    seen = []

    def velocity(transformer, x, s, text):
        seen.append(s)
        return torch.zeros_like(x)

    monkeypatch.setattr(words_sampling, "velocity", velocity)
    monkeypatch.setattr(words_pretrain, "velocity", velocity)
    words_sampling.sample(pipeline, ["a star"])
    levels = TAFSStableDiffusion3Pipeline(**pipeline.components).rollout_levels(4, data.SIDE, data.SIDE)
    assert torch.stack(seen)[:, 0].tolist() == pytest.approx(levels[:4].tolist(), abs=1e-6)
    words_pretrain.flow_loss(pipeline, *data.training_batch(256, random.Random(0)), torch.Generator().manual_seed(0))
    assert (seen[-1] > 0.8).float().mean() > 0.5


# Judges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_are_right_on_true_scenes(name, true_scenes):
    found = judges.accuracy(*true_scenes, DETECTORS[name])
    assert min(found.values()) >= 0.99, found
    strict = judges.strict_scores(true_scenes[0], [row for _, row in PROMPTS], DETECTORS[name])
    assert sum(strict) / len(strict) >= 0.99


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_not_asked_is_marked_down(name):
    _, row = data.two_coloured(("star", "red"), ("ring", "blue"))
    star, ring = Icon("star", "red", 0), Icon("ring", "blue", 3)
    assert scores([star, ring], row, name) == (1.0, 1.0)
    worse = {
        "colour": [Icon("star", "green", 0), ring],
        "missing": [star],
        "another kind": [star, ring, Icon("moon", "red", 2)],
        "one too many": [star, ring, Icon("star", "red", 2)],
        "nothing": [],
    }
    for what, icons in worse.items():
        strict, graded = scores(icons, row, name)
        assert strict == 0 and graded < 1, what
    assert scores([star], row, name)[1] > scores([], row, name)[1]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_objects_are_counted(name, count):
    icons = [Icon("heart", "pink", cell) for cell in (0, 3, 1, 2)[:count]]
    for asked in data.COUNTS:
        assert scores(icons, data.counted("heart", asked)[1], name)[0] == (asked == count)


@pytest.mark.parametrize("name", DETECTORS)
def test_noise_and_smears_are_no_objects(name):
    noise = torch.rand(1, 3, data.SIDE, data.SIDE, generator=torch.Generator().manual_seed(0))
    smear = torch.full((1, 3, data.SIDE, data.SIDE), 0.95)
    smear[:, :, 3:29, 10:15] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    for image in (noise, smear):
        found = [d for d, _ in DETECTORS[name](judges.to_uint8(image)[0]) if d.confidence > 0.3]
        assert not [d for d in found if d.name != "cross"] or name == "cells"
        assert all(not strict for strict in judges.strict_scores(image, [data.single("star")[1]], DETECTORS[name]))


def test_the_two_detectors_share_no_method(monkeypatch):
    def forbidden(*args, **options):
        raise AssertionError("OpenCV is the first detector's")

    image = judges.to_uint8(render([Icon("star", "red", 0)], GROUND)[None])[0]
    for name in ("findContours", "cvtColor", "resize", "distanceTransform"):
        monkeypatch.setattr(judges.cv2, name, forbidden)
    assert [(d.name, colour) for d, colour in judges.cells(image)] == [("star", "red")]
    with pytest.raises(AssertionError):
        judges.contours(image)


def test_each_judge_asks_its_own_detector(monkeypatch):
    monkeypatch.setattr(judges, "contours", lambda image: [])
    image, rows = render([Icon("star", "red", 3)], GROUND)[None], [data.coloured("star", "red")[1]]
    found = [judge(image, ["a red star"], rows).item() for judge in (judges.StrictReward(), judges.SecondDetector())]
    assert found == [0, 1]


def test_counting_asks_for_sure_objects_as_genevals_rules_do():
    def unsure(image):
        return [(judges.Detection("heart", 0.5, (0.0, 0.0, 14.0, 14.0)), "pink")] * 2

    image = judges.to_uint8(render([], GROUND)[None])[0]
    assert judges.verdict(image, data.counted("heart", 2)[1], unsure)[0] == 0
    assert judges.verdict(image, data.asked("two_object", data.need("heart", 2)), unsure)[0] == 1


def test_preference_is_for_large_icons_whatever_is_drawn():
    def taste(*icons):
        return judges.boldness(judges.to_uint8(render(icons, GROUND)[None])[0])

    small, middle, large = data.RADII
    for kind in KINDS:
        values = [taste(Icon(kind, "red", 0, radius)) for radius in data.RADII]
        assert values[0] < 0.1 and 0.25 < values[1] < 0.75 and values[2] > 0.9, kind
    assert taste(Icon("ring", "red", 1, small), Icon("star", "blue", 2, large)) == pytest.approx(0.5, abs=0.1)
    assert taste() == 0


def test_rewards_take_what_the_trainer_gives():
    images = torch.stack([render([Icon("star", "red", 3)], GROUND), render([], GROUND)])
    rows = [data.coloured("star", "red")[1]] * 2
    for reward, expected in (
        (judges.SceneReward(), [1, 0]),
        (judges.StrictReward(), [1, 0]),
        (judges.SecondDetector(), [1, 0]),
    ):
        assert reward(images, ["a red star"] * 2, rows).tolist() == expected
    assert judges.Preference()(images, [""] * 2, rows)[1] == 0


def test_diversity_is_between_images_of_a_prompt():
    same = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    other = torch.cat([same[:2], 1 - same[:2]])
    assert scenes_geneval.diversity(same, 2) == 0 == scenes_geneval.diversity(other, 2)
    assert scenes_geneval.diversity(other, 4) > 0.1


# Scripts ------------------------------------------------------------------------------------------------------


def tiny_pipeline():
    return scenes_components.build_pipeline(num_layers=1, num_heads=2, head_dim=8, text_width=8, vae_channels=2)


@pytest.fixture
def small_model(monkeypatch, tmp_path):
    folder = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    (folder / "pretraining.jsonl").write_text("{}\n")
    monkeypatch.setattr(scenes_components.load, "__defaults__", (scenes_components.load.__defaults__[0], folder))
    monkeypatch.setattr(scenes_components, "FOLDER", folder)
    monkeypatch.setattr(data, "held_out_prompts", lambda: PROMPTS[:96:16])
    return folder


def test_training_and_judging_run(small_model, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_report, "RESULTS", tmp_path / "scenes.json")
        options = {
            "sample_batch_size": 4,
            "num_generations": 4,
            "train_batch_size": 1,
            "sample_num_batches_per_epoch": 1,
        }
        arguments = ("--epochs", "1", "--options", json.dumps(options), "--images_per_prompt", "2")
        run_script(
            EXAMPLES / "scenes_geneval.py", *arguments, "--reward", "both", "--without_base", "--further", cwd=tmp_path
        )
    said = capsys.readouterr().out
    assert "true scenes by contours: kind 1.000, colour 1.000, count 1.000" in said and "trained 1 epochs" in said
    folder = tmp_path / "runs" / "scenes_both_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["after"]) >= {f"after, {n} annealed steps" for n in (2, 4, 8)}
    assert any("as long again" in name for name in summary["after"]) and summary["updates"] == 4
    assert summary["base"]["base, 4 annealed steps"]["evaluations"] == 4
    assert (folder / "before_after.png").stat().st_size > 1000
    assert list(folder.rglob("pytorch_lora_weights.safetensors"))


def test_the_base_is_judged_with_guidance_and_by_the_best_of_several(monkeypatch):
    panel = scenes_geneval.Panel(PROMPTS[:3], 2, 0)
    drawn = []

    def images(self, pipeline, sampler, steps, guidance=1.0, seed=None):
        drawn.append((sampler, steps, guidance, seed))
        good = guidance == 3.0 and (steps == 32 or sampler == "annealed") and seed in (None, 3)
        return self.real if good else torch.ones_like(self.real)

    monkeypatch.setattr(scenes_geneval.Panel, "images", images)
    rows = scenes_geneval.base_rows(None, panel, panel, full=True)
    names = list(rows)
    assert names[0] == "base, 4 annealed steps" and rows[names[0]]["evaluations"] == 4
    assert [rows[name]["evaluations"] for name in names[1:]] == [8, 64, 64]
    assert [rows[name]["guidance"] for name in names[1:]] == [3.0] * 3
    assert rows[names[1]]["sampler"] == rows[names[3]]["sampler"] == "annealed", (
        "the better one, for all rows of 4 steps"
    )
    assert rows[names[-1]]["geneval"] == 1.0, "the one good draw of eight is kept"
    assert rows[names[0]]["geneval"] == 0.0
    assert {guidance for _, _, guidance, _ in drawn} == {1.0, *scenes_geneval.SCALES}


def test_the_report_says_each_run_and_its_seeds(tmp_path, monkeypatch):
    tags = dict.fromkeys(TAGS, 0.5)
    row = {"geneval": 0.25, "second_detector": 0.2, "preference": 0.1, "diversity": 0.9, "evaluations": 4, "tags": tags}
    for seed, score in ((0, 0.5), (1, 0.7)):
        run = {"reward": "geneval", "seed": seed, "options": {}, "epochs": 3, "cpu_seconds": 5.0, "chosen": False}
        run |= {"base": {"base, 4 annealed steps": row}, "after": {"after, 4 annealed steps": row | {"geneval": score}}}
        folder = tmp_path / f"scenes_geneval_{seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(run))
    (tmp_path / "README.md").write_text("Before.\n<!-- tables: begin -->\nold\n<!-- tables: end -->\nAfter.\n")
    monkeypatch.setattr(scenes_report, "HERE", tmp_path)
    monkeypatch.setattr(scenes_report, "RESULTS", tmp_path / "scenes.json")
    scenes_report.write_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "0.600 (.500 .700)" in text and "old" not in text and text.startswith("Before.") and text.endswith("After.\n")
    )
    assert set(json.loads((tmp_path / "scenes.json").read_text())["runs"]["geneval"]) == {"0", "1"}


def pretrain(folder, steps):
    arguments = (
        "--vae_steps",
        "1",
        "--text_steps",
        "1",
        "--batch",
        "2",
        "--log_every",
        "100",
        "--save_every",
        "1",
        "--steps",
        str(steps),
    )
    made = tiny_pipeline()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_components, "build_pipeline", lambda seed: made)
        patch.setattr(data, "training_prompts", lambda each, seed: PROMPTS[:1])
        paths = ("--state", folder / "state.pt", "--output", folder / "pipeline")
        run_script(EXAMPLES / "scenes" / "scenes_pretrain.py", *arguments, *paths, cwd=folder)


def test_pre_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_pretrain, "WARMUP", 1)
    states = []
    for name, stops in (("whole", (3,)), ("parts", (2, 3))):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            pretrain(folder, stop) if stop == 3 else stopped_at(folder, stop, monkeypatch)
        states.append(torch.load(folder / "state.pt", weights_only=False))
    assert states[0]["progress"]["step"] == states[1]["progress"]["step"] == 3
    for mine, other in zip(states[0]["weights"], states[1]["weights"], strict=True):
        assert torch.equal(mine, other)
    assert (tmp_path / "parts" / "pipeline" / "pretraining.jsonl").exists()


def stopped_at(folder, step, monkeypatch):
    """Run for 3 steps, stopped after the state of `step` was written."""
    save = torch.save

    def saved(kept, path):
        save(kept, path)
        if kept["progress"]["step"] > step:
            path.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", saved)
        with pytest.raises(KeyboardInterrupt):
            pretrain(folder, 3)


def figures(*pairs):
    return [{"vae_rmse": 0.03, "seconds": 9.0}] + [{"seconds": s, scenes_pretrain.FOLLOWED: f} for s, f in pairs]


def test_pre_training_has_settled_once_ten_minutes_gain_nothing():
    assert not scenes_pretrain.settled(figures())
    assert not scenes_pretrain.settled(figures((100, 0.3), (400, 0.3), (690, 0.3))), "not ten minutes yet"
    assert not scenes_pretrain.settled(figures((100, 0.3), (400, 0.31), (700, 0.1))), "a gain, even if lost again"
    assert scenes_pretrain.settled(figures((100, 0.3), (400, 0.305), (700, 0.309)))


def test_a_settled_pre_training_lets_the_rate_fall_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_pretrain, "WARMUP", 1)
    rates = []

    def step(self, rate, batch, ema):
        rates.append(rate)
        self.progress.step += 1
        return torch.zeros(())

    with monkeypatch.context() as patch:
        patch.setattr(scenes_pretrain.Training, "step", step)
        patch.setattr(scenes_pretrain, "measure", lambda pipeline, names=(): {scenes_pretrain.FOLLOWED: 0.5})
        patch.setattr(scenes_pretrain, "settled", lambda rows: rows[-1]["step"] >= 6)
        patch.setattr(scenes_pretrain, "build_pipeline", lambda seed: tiny_pipeline())
        options = {"vae_steps": 1, "text_steps": 1, "steps": 100, "log_every": 2, "save_every": 3, "learning_rate": 1}
        paths = ["--state", str(tmp_path / "state.pt"), "--output", str(tmp_path / "pipeline")]
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        patch.setattr("sys.argv", ["scenes_pretrain.py", *given, *paths])
        scenes_pretrain.main()
    assert rates[:6] == [1.0] * 6 and len(rates) == 8 and rates == sorted(rates, reverse=True) and rates[-1] == 0.5
    assert torch.load(tmp_path / "state.pt", weights_only=False)["progress"]["steps"] == 8
    assert (tmp_path / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_configuration_trains_and_evaluates_from_the_command_line(processes, small_model, tmp_path):
    """In processes of their own, by torchrun with gloo, one of which writes the run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    base, prompts = ["--pretrained_model", str(small_model)], [{"prompt": text} | row for text, row in PROMPTS[:96:48]]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    sizes = {"num_epochs": 1, "eval_freq": 1, "sample_batch_size": 2, "num_generations": 4, "train_batch_size": 2}
    options = [item for name, value in sizes.items() for item in (f"--{name}", str(value))]
    held = ["--eval_prompts", str(tmp_path / "held.jsonl"), "--logdir", str(tmp_path)]
    train = ["train", "--config", "examples/configs/scenes.yaml", *base, *options, *held]
    rewards = ["--reward", "examples/scenes/scenes_judges.py:StrictReward=1.0"]
    judged = ["--prompts", str(tmp_path / "held.jsonl"), "--output_dir", str(tmp_path / "judged")]
    evaluate = ["evaluate", str(tmp_path / "scenes" / "adapter"), *base, *rewards, *judged]
    for arguments in (train, [*evaluate, "--max_sequence_length", "10", "--size", "32x32"]):
        launch = torchrun if arguments is train else []
        done = subprocess.run(
            [sys.executable, *launch, "-m", "trl_tafs.cli", *arguments]
            if not launch
            else [sys.executable, *launch, "--module", "trl_tafs.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "scenes" / "config.json").read_text())
    assert settings["num_processes"] == processes
    lines = [json.loads(line) for line in (tmp_path / "scenes" / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval/annealed_4/SecondDetector" in line for line in lines) == 2
    assert "StrictReward" in (tmp_path / "judged" / "results.json").read_text()


def test_the_shipped_weights_are_small_and_the_base_leaves_something_to_learn():
    files = list(scenes_components.FOLDER.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12e6
    pipeline = scenes_components.load(TAFSStableDiffusion3Pipeline)
    panel = scenes_geneval.Panel(data.held_out_prompts()[::3], 1, 0)
    score = panel.row(pipeline, "annealed", 4)["geneval"]
    assert 0.2 < score < 0.6


def test_the_configurations_prompts_are_the_scripts(tmp_path):
    kept = read_prompt_file(EXAMPLES / "configs" / "scenes_prompts.jsonl")
    assert kept == [{"prompt": text} | row for text, row in data.training_prompts()]
    held = read_prompt_file(EXAMPLES / "configs" / "scenes_held_out.jsonl")
    assert held == [{"prompt": text} | row for text, row in data.held_out_prompts()]
    assert np.mean([row["tag"] == "position" for row in kept]) > 0.1
