import json

import pytest
import tiny


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_learning_rate_follows_its_schedule(pipeline, tmp_path):
    tiny.trainer(pipeline, tmp_path, num_epochs=4, train_lr_scheduler_type="linear").train()
    rates = [line["learning_rate"] for line in log(tmp_path) if "loss" in line]
    assert rates == pytest.approx([2.25e-4, 1.5e-4, 0.75e-4, 0.0])
