"""Tensors as pictures, labelled grids, PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_tafs.output.files import tolerating_disk_faults, write_whole

if TYPE_CHECKING:
    from PIL import Image


def as_images(value: Any) -> list[Image.Image]:
    """Return PIL images in RGB of a PIL image, an array, a tensor, a batch, or a list of these.

    Raises:
        ValueError: the shape isn't an image's; it is named.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return [value.convert("RGB")]
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in as_images(item)]
    pixels = torch.as_tensor(value)
    if pixels.ndim == 4:
        return [image for item in value for image in as_images(item)]
    if pixels.ndim == 2:
        pixels = pixels[None]
    channels = (1, 3, 4)
    first, last = pixels.shape[0] in channels, pixels.shape[-1] in channels
    if pixels.ndim != 3 or not (first or last):
        raise ValueError(f"shape {tuple(pixels.shape)} is no image; use (3, H, W) or (H, W, 3)")
    if last and not (first and isinstance(value, Tensor)):  # both fit a tiny one: tensors have channels first
        pixels = pixels.movedim(-1, 0)
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return [tensor_to_image(pixels[:3].expand(3, -1, -1))]


def tensor_to_image(image: Tensor) -> Image.Image:
    """Return an image (3, H, W) in [0, 1] as a PIL image; one below 64 pixels is enlarged, pixel by pixel."""
    from PIL import Image

    factor = max(1, math.ceil(64 / max(image.shape[-2:])))
    pixels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def sample_grid(images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str = "") -> Image.Image:
    """Return a labelled picture with a row for each prompt and a column for each step.

    Args:
        images: (P, C, 3, H, W) in [0, 1].
        rows: P labels, at the left.
        columns: C labels, on top.
        title: a line above the grid.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    tiles = [[tensor_to_image(image) for image in row] for row in images]
    width, height = tiles[0][0].size
    left = 12 + max(int(font.getlength(label[:48])) for label in rows)
    top = 40 if title else 22
    canvas = Image.new("RGB", (left + len(columns) * (width + 4), top + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 3), title, fill="black", font=font)
    for c, label in enumerate(columns):
        draw.text((left + c * (width + 4), top - 18), label, fill="black", font=font)
    for r, label in enumerate(rows):
        draw.text((4, top + r * (height + 4) + height // 2 - 7), label[:48], fill="black", font=font)
        for c, tile in enumerate(tiles[r]):
            canvas.paste(tile, (left + c * (width + 4), top + r * (height + 4)))
    return canvas


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG and make its folder; where the disk fails, warn and go on without the picture."""
    with tolerating_disk_faults(path):
        write_whole(path, lambda beside: image.save(beside, format="PNG"))
