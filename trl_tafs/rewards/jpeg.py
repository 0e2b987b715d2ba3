"""DDPO's smoke-test rewards: the size of the image as a JPEG (Black et al. 2023, section 5)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.rewards.preprocessing import to_uint8


def jpeg_size(images: Tensor, quality: int = 95) -> Tensor:
    """Return the kilobytes (1000) of each image (B, 3, H, W) in [0, 1] as a JPEG: (B,)."""
    return torch.tensor([_encoded(image, quality) / 1000 for image in to_uint8(images).numpy()])


def _encoded(image: np.ndarray, quality: int) -> int:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


def jpeg_incompressibility(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """Return the size: detail and noise are rewarded."""
    return jpeg_size(images)


def jpeg_compressibility(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """Return minus the size: smooth images are rewarded."""
    return -jpeg_size(images)


for _reward in (jpeg_incompressibility, jpeg_compressibility):
    _reward.runs_in_threads = True
