"""Statistics of an evaluation: intervals, paired differences, correlations; and statistics of the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

THUMBNAIL = 16  # pixels a side, on which images of one prompt are compared


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int  # of the prompts behind it


def prompt_means(values: Sequence[float | None], prompts: Sequence[int]) -> dict[int, float]:
    """Return the mean over each prompt's images that have a score; prompts without any are left out."""
    groups: dict[int, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        if value is not None and value == value:
            groups.setdefault(prompt, []).append(float(value))
    return {prompt: sum(group) / len(group) for prompt, group in groups.items()}


def bootstrap(means: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean over prompts and its percentile interval, by drawing prompts with replacement (Efron 1979).

    Args:
        means: one number a prompt, n of them; with fewer than two the interval is NaN.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    data = np.asarray(means, dtype=np.float64)
    if len(data) < 2:
        return Estimate(float(data.mean()) if len(data) else float("nan"), float("nan"), float("nan"), len(data))
    rows = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    low, high = np.quantile(data[rows].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(data.mean()), float(low), float(high), len(data))


def paired_difference(first: dict[int, float], second: dict[int, float], **options: Any) -> Estimate:
    """Return `second - first` over the prompts that both have, bootstrapped as pairs: the prompts' part cancels."""
    shared = sorted(first.keys() & second.keys())
    return bootstrap([second[prompt] - first[prompt] for prompt in shared], **options)


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Pearson's correlation; NaN with fewer than two pairs or without variance."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    valid = ~(np.isnan(x) | np.isnan(y))
    x, y = x[valid], y[valid]
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def saturation(images: Tensor) -> Tensor:
    """Return the mean HSV saturation, (max - min) / max of the channels, of images (B, 3, H, W): (B,) in [0, 1]."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1e-6)).mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Return the deviation of the Laplacian of the grey image (B, 3, H, W): (B,), near 0 for blur, large for halos."""
    gray = images.mean(1, keepdim=True)
    kernel = gray.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return F.conv2d(gray, kernel).flatten(1).std(1)


def colour_entropy(images: Tensor, bins: int = 8) -> Tensor:
    """Return the Shannon entropy of the colour histogram, `bins` a channel, of images (B, 3, H, W): (B,) bits.

    At most 3 log2(bins); it collapses where a policy paints everything in few colours.
    """
    levels = (images.clamp(0, 1) * bins).long().clamp(max=bins - 1)
    codes = (levels[:, 0] * bins + levels[:, 1]) * bins + levels[:, 2]
    counts = torch.stack([torch.bincount(code.flatten(), minlength=bins**3) for code in codes]).double()
    shares = counts / counts.sum(1, keepdim=True)
    return -(shares * shares.clamp(min=1e-12).log2()).sum(1).float()


def saturated_pixels(images: Tensor, margin: float = 1 / 255) -> Tensor:
    """Return the share of values of images (B, 3, H, W) at either end of [0, 1], within `margin`: (B,) in [0, 1].

    Black and white that a picture is asked for count too; it is the rise over the base's that tells.
    """
    return ((images <= margin) | (images >= 1 - margin)).float().mean((1, 2, 3))


def thumbnails(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) reduced to (B, 3, 16, 16) uint8."""
    small = F.interpolate(images, size=(THUMBNAIL, THUMBNAIL), mode="area")
    return (small.clamp(0, 1) * 255).round().to(torch.uint8)


def diversity(small: Tensor) -> float:
    """Return the mean distance, root mean square in [0, 1], of a prompt's images (n, 3, h, w) uint8; NaN for n < 2."""
    flat = small.flatten(1).float() / 255
    if len(flat) < 2:
        return float("nan")
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return (distances.sum() / (len(flat) * (len(flat) - 1))).item()


IMAGE_STATISTICS = {
    "saturation": saturation,
    "sharpness": sharpness,
    "colour_entropy": colour_entropy,
    "saturated_pixels": saturated_pixels,
}


def image_statistics(images: Tensor) -> Tensor:
    """Return every statistic of images (B, 3, H, W): (B, 4) float64, in the order of `IMAGE_STATISTICS`."""
    return torch.stack([measure(images.float()) for measure in IMAGE_STATISTICS.values()], dim=1).double()
