"""A run's words: what will be drawn and written, evaluations, what came of it."""

import re
import shlex

import pytest
import tiny

from trl_tafs.cli.evaluate import evaluation_parser
from trl_tafs.cli.sample import sampling_parser
from trl_tafs.output import speech
from trl_tafs.training import narrator


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def lines(caplog):
    caplog.set_level("INFO", "trl_tafs")
    return lambda: [record.message for record in caplog.records]


def test_a_run_says_what_it_will_do_what_it_finds_and_where_all_is(pipeline, tmp_path, lines):
    options = {"eval_freq": 1, "eval_prompts": ["one", "two"], "eval_num_steps": [2], "eval_samplers": ["annealed"]}
    options |= {"eval_reward_function": {"judge": brightness}, "picture_freq": 2, "run_name": "run"}
    trainer = tiny.trainer(pipeline, tmp_path, metric_for_best_model="eval/annealed_2/judge", **options)
    trainer.train()
    said = lines()
    assert "2 epochs x 2 groups x 8 images x 4 steps = 32 images in 128 steps, 2 updates" in said
    writes = next(line for line in said if line.startswith("writes to"))
    assert str(tmp_path) in writes and "pictures/ every 2 epochs" in writes and "best/" in writes
    evaluations = [line for line in said if line.startswith("held out, ") and line.endswith("s)")]
    assert [re.match(r"held out, (.*?):", line)[1] for line in evaluations] == [
        "before training", "after epoch 1", "after epoch 2"
    ]  # fmt: skip
    first, last = (trainer.progress.evaluations[i]["eval/annealed_2/judge"] for i in (0, -1))
    assert f"annealed_2/judge {last:.4g} (first {first:.4g})" in evaluations[-1]
    curve = trainer.progress.reward_curve
    told = f"reward {curve[0][1]:.4g} in the first epoch, {curve[-1][1]:.4g} in the last"
    assert any(line.startswith(told) for line in said)
    assert any(f"adapter: {tmp_path / 'adapter'}; report: {tmp_path / 'report.html'}" in line for line in said)
    for written in ("adapter", "report.html", "metrics.jsonl", "pictures/epoch_000002/0.png", "best"):
        assert (tmp_path / written).exists(), f"what it says that it writes: {written}"


def test_the_commands_that_it_ends_with_are_understood():
    sample, evaluate, push = narrator.next_commands("base", tiny.ROOT / "an adapter", "me/run", "it's a cat")
    found = sampling_parser().parse_args(shlex.split(sample)[2:])
    assert (found.adapter, found.prompt) == (str(tiny.ROOT / "an adapter"), ["it's a cat"])
    assert evaluation_parser().parse_args(shlex.split(evaluate)[2:]).pretrained_model == "base"
    assert shlex.split(push) == ["trl-tafs", "push", str(tiny.ROOT / "an adapter"), "me/run"]


def test_without_a_terminal_a_run_is_quiet(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speech.logging.getLogger(), "handlers", [])
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, disable_tqdm=False)
    capsys.readouterr()
    trainer.train()
    assert capsys.readouterr() == ("", "")


def test_the_bar_carries_reward_held_out_metric_and_kl(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speech.sys.stderr, "isatty", lambda: True)
    options = {"eval_freq": 1, "eval_prompts": ["one"], "eval_num_steps": [2], "objective": "matched"}
    tiny.trainer(pipeline, tmp_path, num_epochs=1, disable_tqdm=False, **options).train()
    assert re.search(r"epochs.*reward=[\d.]+, held-out=[\d.]+, kl=", capsys.readouterr().err)
