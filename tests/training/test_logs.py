import json

import pytest
import tiny


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
