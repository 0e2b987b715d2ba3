"""What is logged of an epoch: rewards by name and step, means between two steps, times."""

import json

import pytest
import tiny
import torch

from trl_tafs.training.logs import MeanMetrics, Stopwatch


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rewards_are_logged_by_name_and_step(pipeline, tmp_path):
    calls = []

    def by_step(images, prompts, metadata):  # a call a scored step, three a batch, in order
        if len(images) == 2:  # the preflight
            return [0.0, 0.0]
        part, step = divmod(len(calls) - 1, 3)
        return [float(step) + 10 * i + 100 * part for i in range(len(images))]

    def constant(images, prompts, metadata):
        if len(images) > 2:
            calls.append(len(images))
        return [5.0] * len(images)

    seen = []
    rewards = {"constant": constant, "by_step": by_step}
    tiny.trainer(pipeline, tmp_path, rewards, hook=lambda rows, *rest: seen.extend(rows), num_epochs=1).train()
    line = next(line for line in log(tmp_path) if "reward" in line)
    assert line["rewards/constant/mean"] == 5 and line["rewards/by_step/mean"] == pytest.approx(2 + 35 + 50)
    steps = [line[f"reward/step_{n}"] for n in (2, 3, 4)]
    assert [s - steps[0] for s in steps] == pytest.approx([0, 1, 2])
    for part, row in enumerate(seen):
        assert row[3].tolist() == [5 + 2 + 10 * i + 100 * part for i in range(8)]


def test_a_reward_without_any_score_is_named(pipeline, tmp_path):
    rewards = {"bright": tiny.brightness, "silent": lambda images, p, m: [None] * len(p)}
    with pytest.warns(UserWarning, match="silent gave no score for any image"):
        tiny.trainer(pipeline, tmp_path, rewards, num_epochs=1).train()


def test_mean_metrics_are_means_since_the_last_pop():
    metrics = MeanMetrics()
    metrics.add({"loss": torch.tensor(1.0, requires_grad=True)})
    metrics.add({"loss": torch.tensor(3.0)})
    popped = metrics.pop()
    assert popped["loss"].item() == 2.0
    assert not popped["loss"].requires_grad
    metrics.add({"loss": torch.tensor(7.0)})
    assert metrics.pop()["loss"].item() == 7.0
    assert metrics.pop() == {}


def test_mean_metrics_keep_no_reference_to_what_was_added():
    metrics, value = MeanMetrics(), torch.tensor(1.0)
    metrics.add({"loss": value})
    value += 10
    metrics.add({"loss": value})
    assert metrics.pop()["loss"].item() == 6.0


def test_stopwatch_adds_up_stretches_of_one_name_also_through_errors():
    watch = Stopwatch()
    with watch("rollout"):
        pass
    with pytest.raises(KeyError), watch("rollout"):
        raise KeyError
    popped = watch.pop()
    assert list(popped) == ["time/rollout"]
    assert 0 <= popped["time/rollout"] < 1
    assert watch.pop() == {}
