"""Options that make evaluations faster: the same results, and the same names of weights."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from trl_tafs.policy.adapter_file import WEIGHT_NAME

SMALL = {"num_epochs": 1, "objective": "matched", "beta": 0.1, "sample_num_batches_per_epoch": 1, "save_freq": 0}


def trained(folder, where, **options):
    trainer = tiny.trainer(tiny.load(folder), where, train_learning_rate=1e-2, **SMALL | options)
    trainer.train()
    return load_file(where / "adapter" / WEIGHT_NAME)


@pytest.fixture(scope="module")
def plain(pipeline_folder, tmp_path_factory):
    return trained(pipeline_folder, tmp_path_factory.mktemp("plain"))


def distance(one, other):
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-6)).item() for name in one)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-5, marks=pytest.mark.slow),
        ({"attention_backend": "_native_math"}, 1e-3),
        pytest.param({"torch_compile": True}, 1e-2, marks=pytest.mark.slow),
    ],
    ids=["compiled", "attention", "inductor"],
)
def test_an_adapter_is_the_same_and_has_the_same_names(options, tolerance, plain, pipeline_folder, tmp_path):
    assert distance(plain, trained(pipeline_folder, tmp_path, **options)) <= tolerance


def test_compiled_evaluations_are_whole_graphs(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, torch_compile=True, torch_compile_backend="eager", **SMALL)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer.step(0, 0)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "rollout, base, update"


def test_an_attention_backend_that_there_is_not_is_named(pipeline, tmp_path):
    with pytest.raises(ValueError, match="attention_backend='flashy' can't be used with SD3Transformer2DModel"):
        tiny.trainer(pipeline, tmp_path, attention_backend="flashy")
