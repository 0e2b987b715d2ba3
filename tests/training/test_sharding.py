"""FSDP2 computes what DDP does, to the bit, keeps a share of the base a process, and stops as one."""

import diffusers
import distributed_run
import pytest
import tiny
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import is_torch_version
from families import EDITORS, FAMILIES, stock
from torch.distributed.fsdp import CPUOffloadPolicy
from torchrun import launched

from trl_tafs.policy.sharding import block_names, check_shardable
from trl_tafs.training.launch import check_launch

pytestmark = pytest.mark.skipif(is_torch_version("<", "2.7.0"), reason="FSDP2 with adapters needs torch 2.7")
CREATED = [name for name, family in FAMILIES.items() if family.pipeline not in EDITORS]


@pytest.fixture(scope="module")
def two(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, launched("sharded_run.py", folder, pipeline_folder)


def assert_same(pairs, others):
    """DDP's and FSDP2's run of one process: the world, the shards, and everything else to the bit."""
    ddp, fsdp = pairs["ddp"], pairs["fsdp2"]
    assert (ddp["world"], ddp["type"], fsdp["world"], fsdp["type"]) == (2, "MULTI_CPU", 2, "FSDP")
    own, whole, adapters = fsdp["shards"]
    assert 0.4 * whole < own < 0.6 * whole and not ddp["shards"][1], "the base lies in shards"
    assert adapters == 4 * sum(value.numel() for value in fsdp["weights"].values()), "nothing else is left whole"
    assert torch.equal(ddp["final"], fsdp["final"]), "rollouts"
    assert ddp["losses"] == fsdp["losses"] and ddp["curve"] == fsdp["curve"] and len(ddp["losses"]) == 2
    assert ddp["evaluations"] == fsdp["evaluations"]
    for one, other in zip(ddp["gradients"], fsdp["gradients"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and any(a.any() for a in one)
    for key, value in ddp["weights"].items():
        assert torch.equal(value, fsdp["weights"][key]), key
        assert torch.equal(value, others["fsdp2"]["weights"][key]), "the processes stay in step"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_shards_change_nothing(two, precision):
    """Losses, gradients, weights; a float32 LoRA on a float32 base, and on a bfloat16 one."""
    _, (first, second) = two
    assert_same(first[precision], second[precision])
    assert_same(second[precision], first[precision])


def test_shards_are_one_process(two, pipeline_folder, tmp_path):
    _, results = two
    settings = {"beta": 0.01, "train_learning_rate": 1e-3, "train_gradient_checkpointing": True}
    one = distributed_run.run(tmp_path, pipeline_folder, 4, **settings)
    runs = [result["no"]["fsdp2"] for result in results]
    assert one["world"] == 1
    torch.testing.assert_close(torch.cat([run["final"] for run in runs]), one["final"], atol=1e-5, rtol=0)
    for mine, theirs in zip(one["gradients"], runs[0]["gradients"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    for key, value in one["weights"].items():
        torch.testing.assert_close(value, runs[0]["weights"][key], atol=1e-5, rtol=0)


def test_where_one_process_has_no_advantage_all_evaluate_together(two):
    _, (first, second) = two
    assert_same(first["flat"], second["flat"])


def test_the_adapter_of_a_sharded_run_loads_in_plain_diffusers(two, pipeline_folder):
    folder, results = two
    run = folder / "no" / "fsdp2"
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(run / "adapter", adapter_name="trained")
    loaded = {
        name.replace(".trained", ""): value for name, value in pipe.transformer.state_dict().items() if "lora_" in name
    }
    weights = results[0]["no"]["fsdp2"]["weights"]
    assert loaded.keys() == weights.keys()
    scale = 8 / 4  # alpha over rank, which the published weights have in them
    for name, value in loaded.items():
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(loaded[other] @ value, scale * weights[other] @ weights[name])
    pictures = {path.name for path in (run / "adapter" / "images").iterdir()}
    assert {"before_0.png", "after_0.png"} <= pictures, "drawn by all processes"
    for picture in pictures:
        ddp = folder / "no" / "ddp" / "adapter" / "images" / picture
        assert ddp.read_bytes() == (run / "adapter" / "images" / picture).read_bytes()


def test_the_doctor_of_shards_finds_nothing_and_leaves_no_trace(two):
    _, results = two
    for result in results:
        assert result["no"]["fsdp2"]["report"].findings == ()
        assert result["no"]["fsdp2"]["report"].gradients == result["no"]["ddp"]["report"].gradients


def test_a_reward_that_fails_on_one_process_stops_all_and_loses_nothing(two):
    _, results = two
    assert "a reward failed on another process" in results[0]["error"]
    assert "ConnectionError: judge is down" in results[1]["error"]
    for key, value in results[0]["no"]["fsdp2"]["weights"].items():
        assert all(torch.equal(value, result["resumed"]["weights"][key]) for result in results)


def test_a_vae_that_makes_nan_on_one_process_stops_all(two):
    _, results = two
    for early, place in ((True, "before the first epoch"), (False, "epoch 0, step 0")):
        assert results[0]["spoiled", early].startswith(f"{place}: NonFiniteError on another process")
        assert "decoded finite latents to NaN" in results[1]["spoiled", early]


def test_a_signal_to_one_process_stops_all_and_a_resume_goes_on_to_the_bit(two):
    _, results = two
    assert [result["code"] for result in results] == [143, 143], "one was told"
    for key, value in results[0]["no"]["fsdp2"]["weights"].items():
        assert all(torch.equal(value, result["continued"]["weights"][key]) for result in results)


def test_a_checkpoint_of_shards_is_resumed_by_one_process_without(two, pipeline_folder, tmp_path):
    folder, results = two
    checkpoint = folder / "no" / "fsdp2" / "checkpoints" / "checkpoint_000001"
    settings = {"beta": 0.01, "train_learning_rate": 1e-3, "train_gradient_checkpointing": True}
    one = distributed_run.run(tmp_path, pipeline_folder, 4, resume=str(checkpoint), **settings)
    assert one["world"] == 1 and len(one["gradients"]) == 1, "the second epoch alone"
    for key, value in one["weights"].items():
        torch.testing.assert_close(value, results[0]["no"]["fsdp2"]["weights"][key], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CREATED)
def test_shards_change_nothing_in_any_family(name, tmp_path):
    first, second = launched("sharded_run.py", tmp_path, "-", name)
    assert_same(first[name], second[name])


@pytest.mark.parametrize("name", CREATED)
def test_every_layer_of_a_denoiser_is_in_a_block(name):
    """What is gathered one at a time: what isn't in one is gathered for the whole of an evaluation."""
    denoiser = stock(name).transformer
    names = set(block_names(denoiser))
    lists = [(n, m) for n, m in denoiser.named_children() if isinstance(m, torch.nn.ModuleList)]
    layers = [layer for n, modules in lists if n.endswith(("blocks", "layers", "refiner")) for layer in modules]
    assert len(layers) >= 2
    for layer in layers:
        assert names & {type(module).__name__ for module in layer.modules()}, type(layer).__name__


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"full_finetuning": True}, "full_finetuning can't be had while FSDP2 shards the denoiser: only a frozen base"),
        ({"dm_weight": 1.0}, "dm_weight can't be had .* use dm_weight=0"),
        ({"model_cpu_offload": True}, "model_cpu_offload can't be had"),
        ({"torch_compile": True}, "torch_compile can't be had"),
    ],
)
def test_what_shards_exclude_is_refused_before_the_pipeline_is_touched(tmp_path, changes, told):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    config = tiny.config(tmp_path, accelerator_kwargs={"fsdp_plugin": plugin}, **changes)
    with pytest.raises(ValueError, match=told):
        check_launch(config)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fsdp_version": 1}, "launched for FSDP with fsdp_version=1: .* set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "set fsdp_cpu_ram_efficient_loading: false"),
        ({"activation_checkpointing": True}, "use train_gradient_checkpointing=True"),
        ({"cpu_offload": CPUOffloadPolicy(pin_memory=False)}, "set fsdp_offload_params: false"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused_by_its_line(tmp_path, monkeypatch, options, told):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin writes
    plugin = FullyShardedDataParallelPlugin(**({"fsdp_version": 2} | options))
    with pytest.raises(ValueError, match=told):
        check_launch(tiny.config(tmp_path, accelerator_kwargs={"fsdp_plugin": plugin}))


def test_a_launch_for_fsdp_is_read_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what `accelerate launch` sets
    with pytest.raises(ValueError, match="fsdp_version=1: .* set fsdp_version: 2"):
        check_launch(tiny.config(tmp_path))
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(tiny.config(tmp_path))
    with pytest.raises(ValueError, match="fsdp_plugin is 'yes'; give accelerate's FullyShardedDataParallelPlugin"):
        check_launch(tiny.config(tmp_path, accelerator_kwargs={"fsdp_plugin": "yes"}))


def test_a_denoiser_that_is_sharded_already_is_refused():
    denoiser = torch.nn.Linear(2, 2)
    check_shardable(denoiser)
    denoiser.weight.device_mesh = "of an earlier trainer"
    with pytest.raises(ValueError, match="the pipeline's Linear is sharded already.*load the pipeline anew"):
        check_shardable(denoiser)
