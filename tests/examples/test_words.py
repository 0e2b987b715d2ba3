"""The second embedded default: what it draws, who judges it, and that its scripts run."""

import json
import sys

import pytest
import torch
from scripts import run_script
from tiny import ROOT

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES / "words"))

import words_ablation  # noqa: E402
import words_components  # noqa: E402
import words_data  # noqa: E402
import words_judges  # noqa: E402
import words_pretrain  # noqa: E402
import words_sampling  # noqa: E402
from words_data import COLOURS, HELD_OUT_WORDS, LAYOUTS, TRAIN_WORDS, prompt_for, render, spell  # noqa: E402

from trl_tafs.rewards.ocr import edit_distance  # noqa: E402

SIZES = list(LAYOUTS)
NAMES = list(COLOURS)


def drawn(size, words=HELD_OUT_WORDS, ground=0.95):
    """True renderings of words, in all colours in turn, with their prompts."""
    colours = torch.arange(len(words)) % len(NAMES)
    images = render(spell(list(words)), colours, torch.full((len(words), 3), ground), size)
    return images, [prompt_for(word, NAMES[c]) for word, c in zip(words, colours.tolist(), strict=True)]


@pytest.fixture(scope="module")
def readers():
    return {judge.__name__: judge for judge in (words_judges.OCRReward(), words_judges.OCRJudge())}


def test_no_held_out_word_is_trained_on():
    assert not set(TRAIN_WORDS) & set(HELD_OUT_WORDS)
    assert len(set(TRAIN_WORDS)) == len(TRAIN_WORDS) > 300 and len(set(HELD_OUT_WORDS)) == len(HELD_OUT_WORDS) > 80
    assert all(len(word) == 4 and set(word) <= set(words_data.LETTERS) for word in TRAIN_WORDS + HELD_OUT_WORDS)


def test_pre_training_draws_strings_and_training_words_but_no_held_out_word(monkeypatch):
    monkeypatch.setattr(words_data, "HELD_OUT_WORDS", ("aaaa", "able"))  # "able" is drawn often, as a training word
    monkeypatch.setattr(words_data, "TRAIN_WORDS", ("acid", "also"))
    letters = words_data.training_letters(3000, torch.Generator().manual_seed(0))
    words = ["".join(words_data.LETTERS[i] for i in row) for row in letters.tolist()]
    assert 0.25 < sum(word in ("acid", "also") for word in words) / 3000 < 0.42
    assert len(set(words)) > 1800
    alike = torch.zeros(500, 4, dtype=torch.int64)  # every string "aaaa"
    monkeypatch.setattr(torch, "randint", lambda high, size, generator: alike if len(size) == 2 else alike[:, 0])
    kept = words_data.training_letters(500, torch.Generator().manual_seed(0))
    assert not (kept == 0).all(1).any()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_stated_share_of_captions_is_wrong(share):
    images, prompts = words_pretrain.draw(600, "small", share, torch.Generator().manual_seed(1))
    assert prompts.count("") / 600 == pytest.approx(words_pretrain.EMPTY_CAPTIONS, abs=0.05)
    named = [i for i, prompt in enumerate(prompts) if prompt]
    asked = spell([words_data.parse(prompts[i])[0] for i in named])
    ink = (1 - images.mean(1))[named]
    right = torch.nn.functional.cosine_similarity(words_data.coverage(asked, "small").flatten(1), ink.flatten(1)) > 0.9
    assert right.float().mean() == pytest.approx(1 - share, abs=0.06)


@pytest.mark.parametrize("size", SIZES)
def test_letters_are_aligned_with_the_patches(size):
    layout = LAYOUTS[size]
    assert layout.cell % layout.patch == layout.margin % layout.patch == layout.height % layout.patch == 0
    assert layout.width == 4 * layout.cell + 2 * layout.margin
    transformer = words_components.build_pipeline(size).transformer.config
    assert (transformer.patch_size, transformer.sample_size) == (layout.patch, layout.width)


def test_every_word_and_colour_is_tokenized_whole_and_differently():
    pipeline = words_components.build_pipeline("small")
    prompts = [prompt_for(word, c) for word in (*TRAIN_WORDS, *HELD_OUT_WORDS) for c in COLOURS]
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_3):
        ids = [tuple(tokenizer(prompt).input_ids) for prompt in prompts]
        assert len(set(ids)) == len(prompts)
        assert max(map(len, ids)) == words_components.MAX_LENGTH
        assert not any(tokenizer.unk_token_id in row for row in ids if tokenizer.unk_token != tokenizer.eos_token)


@pytest.mark.parametrize("size", SIZES)
def test_both_recognisers_read_true_renderings(size, readers):
    images, prompts = drawn(size)
    for name, judge in readers.items():
        assert sum(judge(images, prompts)) / len(prompts) > 0.99, name


def test_what_is_misread_costs_its_share(readers):
    images, prompts = drawn("small", ("tree", "wild"))
    asked = ["trek in red", "wood in red"]  # one letter of four, and two ("wild", "wood")
    assert readers["ocr"](images, asked) == [0.75, 0.5]
    assert readers["ocr"](torch.full((1, 3, 16, 32), 0.9), ["tree in red"]) == [0.0]
    blurred = torch.nn.functional.avg_pool2d(images, 7, 1, 3)
    assert sum(readers["ocr"](blurred, prompts)) / 2 < 0.5
    with pytest.raises(ValueError, match="kind is 'loss'; use 'edit' or 'ctc'"):
        words_judges.OCRReward(kind="loss")


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)]
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_the_likelihood_is_a_smoother_reward():
    judge, (images, prompts) = words_judges.OCRReward(kind="ctc"), drawn("small", ("tree", "wild"))
    right, near, far = (judge(images[:1], [f"{word} in red"])[0] for word in ("tree", "trek", "onyx"))
    assert 0.95 < right <= 1 and right > near > far >= 0
    path = [torch.lerp(images[0], images[1], t) for t in torch.linspace(0, 1, 12).tolist()]  # tree becomes wild
    smooth, coarse = (
        [reward(image[None], prompts[:1])[0] for image in path] for reward in (judge, words_judges.OCRReward())
    )
    assert smooth[0] > 0.95 and smooth[-1] < 0.2 and coarse[-1] <= 0.25
    assert len({round(value, 4) for value in smooth}) > len(set(coarse))


@pytest.mark.parametrize("size", SIZES)
def test_pixel_statistics_know_colour_and_print(size):
    images, prompts = drawn(size)
    colour, print_judge = words_judges.ColourJudge(), words_judges.PrintJudge()
    assert colour(images, prompts).mean() > 0.9 and colour(images, prompts).min() > 0.6
    others = [prompt_for(p.split()[0], NAMES[(NAMES.index(p.split()[2]) + 1) % 6]) for p in prompts]
    assert colour(images, others).mean() < 0.2
    assert colour(torch.full_like(images, 0.9), prompts).max() == 0
    assert torch.allclose(print_judge(images, prompts), torch.ones(len(images)), atol=1e-4)
    wrong_word = [prompt_for("jazz", p.split()[2]) for p in prompts]
    assert torch.allclose(print_judge(images, wrong_word), torch.ones(len(images)), atol=1e-4)
    assert print_judge((images + 0.2 * torch.randn_like(images)).clamp(0, 1), prompts).mean() < 0.85


@pytest.mark.parametrize("size", SIZES)
def test_the_shipped_pipeline_does_what_its_log_says(size, readers):
    pipeline = words_components.load(size)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    images, prompts = drawn(size, HELD_OUT_WORDS[:32])
    decoded = words_sampling.decode_latents(pipeline, words_sampling.encode_images(pipeline, images))
    assert (decoded - images).square().mean().sqrt() < 0.04, "the VAE keeps the pixels"
    folder = words_components.pipeline_folder(size)
    last = json.loads((folder / "pretraining.jsonl").read_text().splitlines()[-1])
    prompts = [prompt_for(word, NAMES[i % 6]) for i, word in enumerate(HELD_OUT_WORDS)]
    reward = sum(readers["ocr"](words_sampling.sample(pipeline, prompts), prompts)) / len(prompts)
    assert reward == pytest.approx(last["annealed_4"], abs=0.05)


def test_pre_training_goes_on_where_it_is_told_and_is_the_same_twice():
    def train():
        pipeline, rng = words_components.build_pipeline("small"), torch.Generator().manual_seed(0)
        words_pretrain.train_flow(pipeline, steps=2, spelling_steps=1, rng=rng, batch=4)
        return pipeline.transformer.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[key], second[key]) for key in first)
    fresh = words_components.build_pipeline("small").transformer.state_dict()
    assert any(not torch.equal(first[key], fresh[key]) for key in first)


def test_words_ocr_writes_what_it_promises(tmp_path, capsys):
    options = [
        "--images_per_word",
        "1",
        "--words",
        "36",
        "--base",
        str(tmp_path / "base.json"),
        "--output_dir",
        str(tmp_path),
    ]
    options += ["--after", "4 annealed steps"]

    def run(*more):
        run_script(EXAMPLES / "words_ocr.py", *options, *more)
        return capsys.readouterr().out, json.loads((tmp_path / "summary.json").read_text())

    out, summary = run("--epochs", "1")
    assert summary["D"] == 1536 and summary["epochs"] == 1
    for when in ("before", "after"):
        assert {"ocr", "second_ocr", "colour", "print", "stderr"} <= set(summary[when]["4 annealed steps"])
    for name in ("grid_before.png", "grid_after.png", "adapter/pytorch_lora_weights.safetensors"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert "before, 32 ODE steps, guidance 3" in out
    base = json.loads((tmp_path / "base.json").read_text())
    assert base == summary["before"]
    base["4 annealed steps"]["ocr"] = 0.123  # read, not judged again
    (tmp_path / "base.json").write_text(json.dumps(base))
    _, summary = run("--seconds", "0.1", "--options", '{"num_generations": 48}')
    assert summary["before"]["4 annealed steps"]["ocr"] == 0.123
    assert summary["epochs"] == 1 and summary["cpu_seconds"] > 0.1 and summary["options"] == {"num_generations": 48}


def test_the_ablation_is_made_of_the_runs_that_are_there(tmp_path):
    rows = {"ocr": 0.5, "second_ocr": 0.4, "colour": 0.9, "print": 0.8, "stderr": 0.03}
    row = words_ablation.ROW
    for name, gain in (("forward", 0.2), ("clipped", 0.1)):
        told = {"D": 1536, "cpu_seconds": 60.0, "epochs": 7, "options": {}, "before": {row: rows}}
        told |= {"after": {row: rows | {"ocr": 0.5 + gain}}}
        (tmp_path / f"small_{name}_0").mkdir()
        (tmp_path / f"small_{name}_0" / "summary.json").write_text(json.dumps(told))
    options = ["--only", "forward", "clipped", "--runs", str(tmp_path), "--results", str(tmp_path / "ablation.json")]
    sys.argv = ["words_ablation.py", *options]
    words_ablation.main()
    found = json.loads((tmp_path / "ablation.json").read_text())["variants"]
    assert [found[f"{name}, small"]["reward_after"] for name in ("forward", "clipped")] == [0.7, 0.6]
    assert found["forward, small"]["reward_before"] == 0.5 and found["forward, small"]["epochs"] == 7
