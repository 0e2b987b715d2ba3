"""Images to a vision model's input, on the tensor: the resizing, cropping and normalising of the official pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_shortest(images: Tensor, size: int, *, mode: str = "bicubic", eight_bit: bool = True) -> Tensor:
    """Resize (B, 3, H, W) so that the shorter side is `size`, with antialiasing; the longer one is rounded down.

    Args:
        images: in [0, 1].
        size: pixels.
        mode: "bicubic" or "bilinear".
        eight_bit: clamp to [0, 1] and round to 1/255, as the official pipelines do that resize a PIL image; False:
            leave the overshoot of the filter, as those do that resize the tensor.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    if short == size:
        return images
    target = [size if side == short else int(size * side / short) for side in (height, width)]
    return resize(images, target, mode=mode, eight_bit=eight_bit)


def resize(images: Tensor, size: Sequence[int], *, mode: str = "bicubic", eight_bit: bool = True) -> Tensor:
    """Resize (B, 3, H, W) to (height, width) with antialiasing; the rest as `resize_shortest`.

    With `eight_bit` the result is Pillow's, to the bit: rows first, rounded, then columns, by its fixed-point weights.
    """
    if not eight_bit:
        return F.interpolate(images, size=list(size), mode=mode, antialias=True)
    pixels = (images.double().clamp(0, 1) * 255).round()
    for axis, target in ((3, size[1]), (2, size[0])):
        if pixels.shape[axis] != target:
            weights = pillow_weights(pixels.shape[axis], target, mode).to(pixels.device)
            filtered = pixels @ weights.T if axis == 3 else weights @ pixels
            pixels = (filtered + 0.5).floor().clamp(0, 255)
    return (pixels / 255).to(images.dtype)


def bicubic(x: Tensor) -> Tensor:
    """Return Keys' cubic kernel with a = -1/2, support 2; as Pillow's and as torch's with antialiasing."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def bilinear(x: Tensor) -> Tensor:
    """Return the triangle kernel, support 1."""
    return (1 - x.abs()).clamp(min=0)


FILTERS = {"bicubic": (bicubic, 2.0), "bilinear": (bilinear, 1.0)}  # and their supports


@lru_cache(maxsize=32)
def pillow_weights(source: int, target: int, mode: str) -> Tensor:
    """Return one axis of Pillow's resize as a matrix, (target, source) float64, in steps of 2^-22.

    Row i is the filter around (i + 1/2) source / target, as wide as the reduction where there is one, normalised and
    rounded. In float64 its products with 8-bit pixels are summed without error.
    """
    kernel, support = FILTERS[mode]
    scale = source / target
    width = max(scale, 1.0)
    center = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    position = torch.arange(source, dtype=torch.float64)[None, :]
    first = (center - support * width + 0.5).floor().clamp(min=0)
    last = (center + support * width + 0.5).floor().clamp(max=source)
    inside = (position >= first) & (position < last)
    weights = kernel((position - center + 0.5) / width) * inside
    return (weights / weights.sum(1, keepdim=True) * 2**22).round() / 2**22


def center_crop(images: Tensor, size: tuple[int, int], *, round_offset: bool = True) -> Tensor:
    """Return the middle (height, width) of (B, 3, H, W).

    An odd margin is split as torchvision does (half to even), or with `round_offset=False` as transformers does (down).
    """
    margins = [images.shape[2] - size[0], images.shape[3] - size[1]]
    top, left = (round(m / 2) if round_offset else m // 2 for m in margins)
    return images[:, :, top : top + size[0], left : left + size[1]]


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Return (images - mean) / std, a number a channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def to_uint8(images: Tensor) -> Tensor:
    """Turn (B, 3, H, W) in [0, 1] into (B, H, W, 3) uint8 on the CPU, contiguous, as Pillow takes it."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1).contiguous()
