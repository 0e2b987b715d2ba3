"""examples/benchmarks/scaling.py: its arithmetic, by hand."""

import sys

from tiny import ROOT

from trl_tafs.training.memory import Footprint
from trl_tafs.training.plan import plan_epoch

sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import scaling  # noqa: E402

FOOTPRINT = Footprint({"transformer": 800}, "transformer", 10, 0, 0, 0, 0, 2, 0)


def test_what_travels_is_counted_by_hand(tmp_path):
    config = scaling.config_of(str(tmp_path))
    plan = plan_epoch(config, 8)
    assert scaling.evaluations(config, plan) == (16 * 4 + 48, 48), "rollout and base; forward and backward"
    ddp = scaling.traffic(FOOTPRINT, config, plan, 5, sharded=False)
    assert (ddp.gradients, ddp.gathers, ddp.messages) == (2 * 7 / 8 * 40, 0, 1)
    shards = scaling.traffic(FOOTPRINT, config, plan, 5, sharded=True)
    assert (shards.gathers, shards.messages) == (7 / 8 * 800 * (64 + 48 + 2 * 48), 1 + 208 * 5)


def test_seconds_are_those_of_evaluations_and_decodes(tmp_path):
    config = scaling.config_of(str(tmp_path), beta=0.0, train_gradient_checkpointing=False)
    plan = plan_epoch(config, 8)
    assert scaling.seconds(config, plan, 1.0, 0.0) == 64 + 3 * 48
    assert scaling.seconds(config, plan, 0.0, 1.0, reward=0.5) == 1.5 * 48
    again = scaling.config_of(str(tmp_path))
    assert scaling.seconds(again, plan, 1.0, 0.0) == 64 + 48 + 4 * 48
