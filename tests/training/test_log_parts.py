import pytest
import torch

from trl_tafs.training.logs import MeanMetrics, Stopwatch


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
