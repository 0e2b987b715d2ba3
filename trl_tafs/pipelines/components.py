"""A pipeline's components: which one is trained and in which dtype it computes, and which ones encode prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def denoiser_name(pipeline: Any) -> str:
    """Return the name of the component that is trained: a TAFS pipeline says it, plain diffusers' is `transformer`."""
    return getattr(pipeline, "denoiser_name", "transformer")


def unwrapped(module: Any) -> Any:
    """Return the module inside `torch.compile`'s wrapper: its weights, adapters and names are the same for both."""
    return getattr(module, "_orig_mod", module)


def denoiser_of(pipeline: Any) -> Any:
    """Return the network that is trained, out of `torch.compile`'s wrapper."""
    return unwrapped(getattr(pipeline, denoiser_name(pipeline)))


def is_text_encoder(name: str) -> bool:
    """Return whether a component of that name is a text encoder: `text_encoder`, `text_encoder_2`, ..."""
    return name.startswith("text_encoder")


def base_dtype(denoiser: nn.Module) -> torch.dtype:
    """Return the dtype in which a denoiser computes: that of its base weights, whatever the LoRA's."""
    names = ((name, p) for name, p in denoiser.named_parameters() if "lora_" not in name)
    return next(p.dtype for _, p in names if p.dtype.is_floating_point)


@contextmanager
def casting_once(device: torch.device) -> Iterator[None]:
    """Inside, autocast casts each trained weight once, however often the denoiser is evaluated: they mustn't change.

    Autocast keeps its casts until its outermost context ends, and each evaluation enters its own. This one, which casts
    nothing itself, lies around them all. Not for evaluations with a gradient, whose casts belong to their graph.
    """
    with torch.autocast(device.type, enabled=False):
        yield


def vae_tiles(vae: nn.Module, height: int, width: int) -> bool:
    """Return whether a VAE whose tiling is on decodes an image of that size, in pixels, in more than one tile."""
    square = getattr(vae, "tile_sample_min_size", None)
    tile_height = square or getattr(vae, "tile_sample_min_height", 0)
    tile_width = square or getattr(vae, "tile_sample_min_width", 0)
    return height > tile_height or width > tile_width
