"""The frozen base: its place, its dtype, and what it must not carry."""

from __future__ import annotations

import re

import torch
from torch import nn

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import is_text_encoder
from trl_tafs.pipelines.quantized import is_bitsandbytes, is_quantized
from trl_tafs.policy.offload import DeviceSharing
from trl_tafs.policy.options import PolicyOptions

DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def image_size(pipeline: TAFSPipelineMixin, config: PolicyOptions) -> tuple[int, int]:
    """Return height and width, and check all that the pipeline must be able to do.

    Raises:
        TypeError: it is no TAFS pipeline.
        ValueError: it can't draw in that size, with that guidance, prompts of that length, or by its scheduler.
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
    pipeline.check_sequence_length(config.max_sequence_length)
    pipeline.embedded_guidance(config.sample_embedded_guidance_scale)
    pipeline.rollout_levels(config.sample_num_steps, height, width)
    return height, width


def prepare_base(pipeline: TAFSPipelineMixin, config: PolicyOptions, device: torch.device) -> DeviceSharing:
    """Freeze the base, put it on the device, cast it to the dtype of `mixed_precision`, and say how models share it.

    What waits on the CPU is cast, too. The VAE keeps its dtype: several decode to black in float16. A quantized module
    keeps its own, and one of bitsandbytes its place.

    Raises:
        ValueError: a model has a hook that moves it, or can't be moved as `model_cpu_offload` asks.
    """
    if config.model_cpu_offload and is_quantized(pipeline.denoiser):
        raise ValueError(
            f"model_cpu_offload can't move a quantized {type(pipeline.denoiser).__name__}, which is small already; "
            "use offload_text_encoders=True"
        )
    dtype = DTYPES[config.mixed_precision]
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    for name, module in modules.items():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"the pipeline's {name} has a hook of Accelerate, as enable_model_cpu_offload or device_map leave one; "
                "call pipeline.remove_all_hooks() and use model_cpu_offload=True"
            )
        module.requires_grad_(False)
        module.eval()  # rollout and replay alike: no dropout anywhere
        waits = config.model_cpu_offload and module is not pipeline.denoiser
        waits = waits or (config.offload_text_encoders and is_text_encoder(name))
        if not is_bitsandbytes(module):
            module.to("cpu" if waits else device)
        trained = config.full_finetuning and module is pipeline.denoiser
        if dtype is not None and name != "vae" and not trained and not is_quantized(module):
            cast(module, dtype)
    tiled = pipeline.vae if config.vae_tiling else None
    if not config.model_cpu_offload:
        return DeviceSharing(pipeline.denoiser, device, tiled=tiled)
    moved = [module for module in pipeline.text_encoders().values() if not is_bitsandbytes(module)]
    return DeviceSharing(pipeline.denoiser, device, moved, [pipeline.vae], tiled)


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
