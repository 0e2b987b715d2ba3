"""The frozen base: its place, its dtype, and what it must not carry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl_tafs.method.guidance import is_guided
from trl_tafs.output.errors import first_line
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import is_text_encoder, unwrapped
from trl_tafs.pipelines.quantized import is_bitsandbytes, is_quantized
from trl_tafs.policy.carried import check_carried
from trl_tafs.policy.offload import DeviceSharing
from trl_tafs.policy.options import PolicyOptions
from trl_tafs.policy.sharding import check_shardable, check_shards

GIB = 2**30
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def image_size(pipeline: TAFSPipelineMixin, config: PolicyOptions, lora_config: Any | None = None) -> tuple[int, int]:
    """Return height and width, and check what the pipeline carries and must be able to do, before it is touched.

    Raises:
        TypeError: it is no TAFS pipeline.
        ValueError: it carries what can't be trained with (`carried.check_carried`), or can't draw in that size, with
            that guidance, prompts of that length, or by its scheduler.
    """
    if not isinstance(pipeline, TAFSPipelineMixin):
        raise TypeError(
            f"sd_pipeline is a {type(pipeline).__name__}, without rollout hooks; load it as a TAFS pipeline, "
            "such as TAFSStableDiffusion3Pipeline.from_pretrained(...)"
        )
    default_height, default_width = pipeline.default_size()
    height, width = config.height or default_height, config.width or default_width
    pipeline.check_size(height, width)
    pipeline.check_guidance(config.sample_guidance_scale)
    if is_guided(config.dm_guidance_scale or 1.0) and not pipeline.has_guidance:
        raise ValueError(
            f"dm_guidance_scale is {config.dm_guidance_scale}, and {pipeline.stock_class().__name__} has no "
            "classifier-free guidance for this model; leave it out: its teacher is then the model as it is, with its "
            "embedded guidance"
        )
    pipeline.check_sequence_length(config.max_sequence_length)
    pipeline.embedded_guidance(config.sample_embedded_guidance_scale)
    pipeline.rollout_levels(config.sample_num_steps, height, width, config.sample_levels)
    check_carried(pipeline, config, lora_config)
    return height, width


def prepare_base(
    pipeline: TAFSPipelineMixin, config: PolicyOptions, device: torch.device, shards: int | None = None
) -> DeviceSharing:
    """Freeze the base, put it on the device, cast it to the dtype of `mixed_precision`, and say how models share it.

    What waits on the CPU is cast, too. The VAE keeps its dtype: several decode to black in float16. A quantized module
    keeps its own, and one of bitsandbytes its place. A denoiser that is to be sharded stays where it is, on the host:
    sharding brings it to the device block by block.

    Args:
        pipeline: whose modules are prepared.
        config: precision, offloading.
        device: where they compute.
        shards: processes among which the denoiser will be sharded; None: it isn't.

    Raises:
        ValueError: a model can't be moved as `model_cpu_offload` asks, or can't be sharded.
    """
    if shards is not None:
        check_shards(config)
        check_shardable(pipeline.denoiser)
    if config.model_cpu_offload and is_quantized(pipeline.denoiser):
        raise ValueError(
            f"model_cpu_offload can't move a quantized {type(pipeline.denoiser).__name__}, which is small already; "
            "use offload_text_encoders=True"
        )
    dtype = DTYPES[config.mixed_precision]
    modules = {n: unwrapped(module) for n, module in pipeline.components.items() if isinstance(module, nn.Module)}
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        arriving = arriving_weights(pipeline, config, device, shards or 1)
        check_room(arriving, config, torch.cuda.mem_get_info(device)[0] + unused)
    if config.attention_backend is not None:
        set_attention_backend(pipeline.denoiser, config.attention_backend)
    for name, module in modules.items():
        module.requires_grad_(False)
        module.eval()  # rollout and replay alike: no dropout anywhere
        waits = config.model_cpu_offload and module is not pipeline.denoiser
        waits = waits or (config.offload_text_encoders and is_text_encoder(name))
        trained = config.full_finetuning and module is pipeline.denoiser
        if dtype is not None and name != "vae" and not trained and not is_quantized(module):
            cast(module, dtype)  # before it is moved, so that the device never holds the wider one
        if not is_bitsandbytes(module) and (shards is None or module is not pipeline.denoiser):
            module.to("cpu" if waits else device)
    tiled = pipeline.vae if config.vae_tiling else None
    if not config.model_cpu_offload:
        return DeviceSharing(pipeline.denoiser, device, tiled=tiled)
    moved = [module for module in pipeline.text_encoders().values() if not is_bitsandbytes(module)]
    return DeviceSharing(pipeline.denoiser, device, moved, [pipeline.vae], tiled)


def set_attention_backend(denoiser: nn.Module, name: str) -> None:
    """Let a denoiser compute attention by one of diffusers' backends, as `set_attention_backend` does.

    Raises:
        ValueError: there is none of that name, or it can't be used here.
    """
    try:
        denoiser.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        raise ValueError(
            f"attention_backend={name!r} can't be used with {type(denoiser).__name__}: {first_line(error)}; use one "
            "that diffusers has here, such as 'native', or leave it out"
        ) from error


def cast_bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Return the bytes of a module's weights and buffers once it is cast to a dtype; None: as it is."""
    tensors = (*module.parameters(), *module.buffers())
    sizes = (dtype.itemsize if dtype and tensor.is_floating_point() else tensor.element_size() for tensor in tensors)
    return sum(size * tensor.numel() for size, tensor in zip(sizes, tensors, strict=True))


def arriving_weights(
    pipeline: TAFSPipelineMixin, config: PolicyOptions, device: torch.device, shards: int = 1
) -> dict[str, int]:
    """Return the bytes of each component that isn't on the device yet, as it will be cast; quantized ones left out.

    Of the denoiser they are those of one of its shards.
    """
    dtypes = {"vae": None} | ({pipeline.denoiser_name: torch.float32} if config.full_finetuning else {})
    return {
        name: cast_bytes(module, dtypes.get(name, DTYPES[config.mixed_precision]))
        // (shards if name == pipeline.denoiser_name else 1)
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module) and not is_quantized(module)
        if all(parameter.device.type != device.type for parameter in module.parameters())
    }


def check_room(weights: Mapping[str, int], config: PolicyOptions, free: int) -> None:
    """Refuse a base whose weights alone have no room on the device, before any is moved.

    Args:
        weights: bytes of each model that isn't there yet, by component.
        config: says which models wait on the CPU.
        free: bytes of the device.

    Raises:
        ValueError: they don't fit; says what would.
    """
    without_text = {name: size for name, size in weights.items() if not is_text_encoder(name)}
    choices = {
        "": weights,
        "offload_text_encoders=True": without_text,
        "model_cpu_offload=True": {name: size for name, size in without_text.items() if name != "vae"},
    }
    order = list(choices)
    chosen = order[2 if config.model_cpu_offload else 1 if config.offload_text_encoders else 0]
    placed = choices[chosen]
    if sum(placed.values()) <= free:
        return
    remedies = [name for name in order[order.index(chosen) + 1 :] if sum(choices[name].values()) <= free]
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in placed.items())
    raise ValueError(
        f"the models' weights take {sum(placed.values()) / GIB:.2f} GiB ({shown}), and the device has {free / GIB:.2f} "
        f"free; use {' or '.join([*remedies, 'a quantized base'])} (docs/memory.md)"
    )


def compiled(component: nn.Module, prepared: nn.Module, config: PolicyOptions) -> tuple[nn.Module, nn.Module]:
    """Return the prepared network and the pipeline's own, compiled as that is or as `torch_compile` asks.

    Accelerate prepares the network itself, so that its weights have the same names in either case.
    """
    alone = unwrapped(component) is prepared
    if unwrapped(component) is not component:
        return component if alone else component.dynamo_ctx(prepared), component
    if not config.torch_compile:
        return prepared, component
    model = torch.compile(prepared, backend=config.torch_compile_backend)
    return model, model if alone else torch.compile(component, backend=config.torch_compile_backend)


@contextmanager
def normal_mode() -> Iterator[None]:
    """Inside, gradients can be taken, whatever mode the process is in; a decorator, too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def take_off_autocast(denoiser: nn.Module) -> None:
    """Undo what the Accelerate of an earlier trainer put around the denoiser's forward, and the mark that it did.

    With the mark left on, the next trainer's Accelerate would put nothing on, and the denoiser would run without
    autocast.
    """
    original = denoiser.__dict__.pop("_original_forward", None)
    denoiser.__dict__.pop("_is_accelerate_prepared", None)
    if original is None:
        return
    denoiser.__dict__.pop("forward", None)
    if getattr(original, "__func__", None) is not type(denoiser).forward:  # somebody's own forward, below Accelerate's
        denoiser.forward = original


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module as `from_pretrained(dtype=dtype)` would: parts that overflow in a short dtype keep theirs.

    Transformers' `_keep_in_fp32_modules` are those under float16 (T5's `wo`), its `_strict` ones and diffusers' always.
    """
    from diffusers import ModelMixin

    names = list(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or isinstance(module, ModelMixin):
        names += getattr(module, "_keep_in_fp32_modules", None) or ()
    pattern = re.compile(rf"(^|\.)({'|'.join(names)})(\.|$)") if names else None
    kept = [(p, p.data) for name, p in module.named_parameters() if pattern is not None and pattern.search(name)]
    nn.Module.to(module, dtype)  # diffusers' own `to` warns of the parts that are kept here
    for parameter, data in kept:
        parameter.data = data
