import json

import pytest
import tiny
import torch

from trl_tafs.evaluation.drawing import EVAL_EPOCH
from trl_tafs.evaluation.held_out import metric_names
from trl_tafs.method.noise import SampleNoise


def test_a_smaller_metric_can_be_the_better_one(pipeline, tmp_path):
    values = iter([9.0, 0.5, 0.4, 0.3, 0.6])  # the first is the preflight's
    trainer = tiny.trainer(
        pipeline,
        tmp_path,
        num_epochs=3,
        eval_freq=1,
        eval_num_steps=[2],
        eval_samplers=["annealed"],
        eval_prompts=["three"],
        eval_reward_function={"judge": lambda images, p, m: [next(values)] * len(images)},
        metric_for_best_model="eval/annealed_2/judge",
        greater_is_better=False,
    )
    trainer.train()
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best["epoch"] == 2 and best["value"] == pytest.approx(0.3)


def test_evaluation_has_noise_of_its_own():
    own, first = (SampleNoise(0, epoch, (0, 1))("initial", 0, (8,)) for epoch in (EVAL_EPOCH, 0))
    assert not torch.equal(own, first)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"metric_for_best_model": "eval/anealed_4/brightness"},
            "'eval/anealed_4/brightness', which no evaluation has; did you mean 'eval/annealed_4/brightness'",
        ),
        (
            {"metric_for_best_model": "x"},
            "no evaluation has; use one of eval/annealed_4/b.*, eval/ode_8/brightness",
        ),
        ({"eval_num_steps": [4, 4]}, "name an evaluation twice"),
        ({"eval_prompts": ["a", {"text": "b"}]}, "eval_prompts: the prompts .*: row 1: there is no 'prompt'"),
        ({"eval_prompts": []}, "eval_prompts: the prompt dataset is empty"),
        ({"eval_prompts": tiny.prompts}, "eval_prompts is a function; held-out prompts are a fixed set"),
        ({"eval_prompts": None}, "eval_freq is 1, and there are no eval_prompts"),
        (
            {"eval_prompts": None, "eval_freq": 0, "eval_reward_function": tiny.brightness},
            "eval_reward_function was given, and there are no eval_prompts",
        ),
        (
            {"eval_prompts": None, "eval_freq": 0, "eval_images_per_prompt": 4},
            "eval_images_per_prompt=4 has no effect without eval_prompts",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_evaluations_that_cannot_be_had_are_refused_before_a_model_is_moved(pipeline, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        tiny.trainer(pipeline, tmp_path, **{"eval_freq": 1, "eval_prompts": ["a"]} | changes)


def test_the_metrics_that_are_known_before_are_those_of_an_evaluation(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, eval_freq=1, eval_prompts=["a"], eval_num_steps=[2, 3])
    trainer.evaluate(0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert [name for name in line if name.startswith("eval/")] == sorted(
        metric_names(trainer.config, trainer.rewards), key=list(line).index
    )
