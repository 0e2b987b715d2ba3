"""What the host asks of a device, counted: on a GPU that is fast for its batch, this is the time of an iteration.

The denoisers have the topology of SD3.5-medium (24 blocks, 13 of them with two attentions) and FLUX.1-dev (19 and 38),
at a tiny width: the number of operators doesn't depend on the width.
"""

from collections import Counter
from contextlib import contextmanager

import diffusers
import families
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_tafs import AutoTAFSPipeline
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.types import PromptBatch
from trl_tafs.prompts.encoder import PromptEncoder

# Those that only say how memory is looked at: no kernel is launched for them.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select"}
VIEWS |= {"split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "as_strided", "_reshape_alias"}


def _sd35_medium():
    pipe = families.stock("sd3")
    pipe.transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=24,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return pipe


def _flux1_dev():
    pipe = families.stock("flux-dev")
    config = {**pipe.transformer.config, "num_layers": 19, "num_single_layers": 38}
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(config)
    return pipe


MODELS = {"SD3.5-medium": _sd35_medium, "FLUX.1-dev": _flux1_dev}


class Operators(TorchDispatchMode):
    """Counts operators that launch something, and copies from the host to the device `meta`."""

    def __init__(self):
        super().__init__()
        self.counts, self.copies = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.counts[name] += name not in VIEWS
        if name in ("_to_copy", "copy_") and result.device.type == "meta":
            source = args[1] if name == "copy_" else args[0]
            self.copies += source.device.type == "cpu"
        return result

    @property
    def total(self):
        return self.counts.total()


@contextmanager
def counting():
    with Operators() as operators:
        yield operators


@pytest.fixture(scope="module", params=MODELS)
def trainer(request, tmp_path_factory):
    pipeline = AutoTAFSPipeline.from_pipe(MODELS[request.param]())
    folder, sizes = tmp_path_factory.mktemp("run"), {"sample_batch_size": 3, "train_batch_size": 3}
    sizes |= {"num_generations": 3, "sample_num_batches_per_epoch": 1, "height": 16, "width": 16}
    return tiny.trainer(pipeline, folder, mixed_precision="bf16", objective="matched", **sizes)


@pytest.fixture(scope="module")
def batch(trainer):
    names = ("a cat", "a cat", "a dog")
    prompts = PromptBatch(names, ({},) * 3, torch.tensor([0, 0, 1]), torch.arange(3))
    trainer.encode(prompts.prompts)
    return prompts


@pytest.fixture(scope="module")
def without_adapter(trainer, batch):
    """Operators of one evaluation of the base, as if there were no LoRA."""
    policy, conditioning = trainer.policy, trainer.encode(batch.prompts)
    shape = policy.pipeline.latent_shape(trainer.height, trainer.width)
    x, level = torch.randn(3, *shape).to(policy.storage_dtype), torch.full((3,), 0.5)
    for layer in policy.layers:
        layer.enable_adapters(False)
    with torch.no_grad():
        policy.velocity(x, level, conditioning)  # positions of tokens are made once
        with counting() as operators:
            policy.velocity(x, level, conditioning)
    for layer in policy.layers:
        layer.enable_adapters(True)
    return operators.total


def kind(trainer):
    return type(trainer.policy.pipeline.denoiser).__name__


def test_a_rollout_costs_little_more_than_evaluations_of_the_base(trainer, batch, without_adapter):
    sampler = trainer.collector.sampler
    with counting() as operators:
        sampler.roll_out(batch, epoch=1)
    # Two products and a sum a layer, and their weights' casts once in a rollout.
    most = {"SD3Transformer2DModel": 1.33, "FluxTransformer2DModel": 1.26}[kind(trainer)]
    assert 1 < operators.total / (4 * without_adapter) <= most
    assert operators.counts["mm"] >= 4 * 2 * len(trainer.policy.layers)


def test_the_reference_costs_what_the_base_costs(trainer, batch, without_adapter):
    policy, conditioning = trainer.policy, trainer.encode(batch.prompts)
    shape = policy.pipeline.latent_shape(trainer.height, trainer.width)
    x, level = torch.randn(3, *shape).to(policy.storage_dtype), torch.full((3,), 0.5)
    with torch.no_grad(), counting() as operators:
        policy.reference(x, level, conditioning)
    assert operators.total == without_adapter


def test_an_update_costs_four_evaluations_of_the_base(trainer, batch, without_adapter):
    """The reference, the policy and its backward pass, on one micro-batch."""
    objective, updater = trainer.algorithm.objective, trainer.updater
    rollout = trainer.collector.sampler.roll_out(batch, epoch=1).rollout
    items = objective.items(rollout, torch.ones(3, 3, 1))
    names, index = [batch.prompts[i] for i in items.sample.tolist()], torch.tensor([0, 4, 8])
    with trainer.policy.updating(), counting() as operators:
        updater._output(items, names, index, 0).loss.backward()
    trainer.policy.optimizer.zero_grad()
    most = {"SD3Transformer2DModel": 4.4, "FluxTransformer2DModel": 4.15}[kind(trainer)]
    assert 3 < operators.total / without_adapter <= most


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "flux2"])
def test_a_rollout_copies_its_noise_and_nothing_else_and_waits_for_nothing(name):
    """On the device `meta`, which has no values: a step that waited for one would raise."""
    pipeline, device = families.ours(families.stock(name), name), torch.device("meta")
    prompts, encode = ["a cat", "a dog", "a cat"], PromptEncoder(pipeline, device, max_sequence_length=8)
    on_host = PromptEncoder(pipeline, torch.device("cpu"), max_sequence_length=8)
    on_host(prompts)
    encode.cache = on_host.cache
    encode(prompts)
    pipeline.denoiser.to(device)
    size = families.FAMILIES[name].size
    levels = pipeline.rollout_levels(4, size, size).to(device)
    pipeline.rollout_levels = lambda *sizes: levels

    def roll_out(conditioning):
        noise = SampleNoise(0, 0, (0, 1, 2), device)
        return pipeline.annealed_rollout(conditioning=conditioning, height=size, width=size, noise=noise)

    roll_out(encode(prompts))  # positions of tokens are copied once
    with counting() as operators:
        conditioning = encode(prompts)
    assert operators.copies == 1, "which prompt is whose"
    with counting() as operators:
        rollout = roll_out(conditioning)
    assert operators.copies == 4, "the initial noise and three times that of an action"
    assert rollout.final.device == device


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_the_sum_in_one_operation_is_pefts_to_the_bit(pipeline, scale):
    from peft import LoraConfig

    from trl_tafs.policy.carried import adapter_layers
    from trl_tafs.policy.lora_sum import add_in_one

    denoiser = pipeline.denoiser
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4 * scale, init_lora_weights=False, target_modules=["attn.to_q"]))
    layer, x = adapter_layers(denoiser)[0], torch.randn(5, 7, 64)
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        layer.lora_variant.clear()
        results = []
        for _ in range(2):
            inputs = x.to(dtype).clone().requires_grad_()
            output = layer(inputs)
            output.square().sum().backward()
            results.append((output, inputs.grad))
            add_in_one([layer])
        assert layer.lora_variant
        for before, after in zip(*results, strict=True):
            assert torch.equal(before, after)
    weight = layer.get_base_layer().weight.clone()
    layer.merge(safe_merge=True)
    assert torch.equal(layer(x.bfloat16()), torch.nn.functional.linear(x.bfloat16(), layer.weight, layer.bias))
    layer.unmerge()
    assert torch.allclose(layer.weight, weight, atol=0.05)


def test_a_scale_that_would_round_otherwise_is_left_to_peft(pipeline):
    from peft import LoraConfig

    from trl_tafs.policy.carried import adapter_layers
    from trl_tafs.policy.lora_sum import add_in_one

    pipeline.denoiser.add_adapter(LoraConfig(r=4, lora_alpha=3, target_modules=["attn.to_q"]))
    layers = adapter_layers(pipeline.denoiser)
    add_in_one(layers)
    assert layers and not any(layer.lora_variant for layer in layers)
