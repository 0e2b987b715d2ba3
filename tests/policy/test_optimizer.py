import json

import pytest
import tiny
import torch

from trl_tafs.policy.optimizer import apply_settings, make_lr_scheduler, make_optimizer
from trl_tafs.policy.options import LR_SCHEDULERS


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_learning_rate_follows_its_schedule(pipeline, tmp_path):
    tiny.trainer(pipeline, tmp_path, num_epochs=4, train_lr_scheduler_type="linear").train()
    rates = [line["learning_rate"] for line in log(tmp_path) if "loss" in line]
    assert rates == pytest.approx([2.25e-4, 1.5e-4, 0.75e-4, 0.0])


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_promised_schedule_runs_and_resumes_at_its_rate(name):
    warmup = 0 if name == "constant" else 2
    options = tiny.config(".", train_lr_scheduler_type=name, train_lr_warmup_steps=warmup, train_learning_rate=1e-2)

    def made():
        optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2))], options)
        return optimizer, make_lr_scheduler(optimizer, options, 10)

    optimizer, scheduler = made()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    other, resumed = made()
    resumed.load_state_dict(scheduler.state_dict())
    apply_settings(other, resumed, options)
    assert resumed.get_last_lr() == pytest.approx(scheduler.get_last_lr())
    assert other.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_a_schedule_that_is_not_promised_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="train_lr_scheduler_type is 'inverse_sqrt'; use one of constant, "):
        tiny.config(".", train_lr_scheduler_type="inverse_sqrt")
