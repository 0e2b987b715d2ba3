import json

import pytest
import tiny
import torch

from trl_tafs.evaluation.drawing import EVAL_EPOCH
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
