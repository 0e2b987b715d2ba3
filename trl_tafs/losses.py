"""Loss formulas: the clipped surrogate, its clip range and its level weights. They return; nothing is logged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trl_tafs.types import LossOutput

CLIP_RANGE = 0.025
"""Default clip range in the units of the "sqrt" reduction; measured, see docs/algorithm.md."""

LEVEL_WEIGHTINGS = {
    "gaussian": lambda std: torch.ones_like(std),  # the density as it is: a factor 1 / (2 std^2) on the distance
    "uniform": lambda std: 2 * std.square(),  # that factor taken out again: every level counts by its distance
}


def clip_range_for(reduction: str, num_elements: int, sqrt_range: float = CLIP_RANGE) -> float:
    """The clip range that allows the same change of the policy in the units of `reduction`.

    A relative change e of the mean, `|mean - mean_old| = e std` an element, moves the joint log-ratio by
    `e sqrt(D) z`, z a standard normal, so that the same limit on e is c in "sqrt" units, `c sqrt(D)` in "sum" and
    `c / sqrt(D)` in "mean" units: .025 is .2 and .003 at D = 64, 6.4 and 1e-4 at D = 65,536.
    """
    root = math.sqrt(num_elements)
    return sqrt_range * {"sqrt": 1.0, "sum": root, "mean": 1 / root}[reduction]


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float, weight: Tensor | None = None
) -> LossOutput:
    r"""Eq. 10, negated: `-mean(w min(r A, clip(r, 1 - eps, 1 + eps) A))`, `r = exp(log p - log p_old)`.

    Args:
        log_prob: (T, M) of the present policy, with gradient.
        old_log_prob: (T, M) of the policy that sampled, same reduction.
        advantage: (T, M).
        clip_range: eps, in the units of the reduction.
        weight: (T, 1), the level weights; None for 1.

    Returns:
        The loss, and `approx_kl` (`mean((log r)^2) / 2`, as DDPOTrainer's), `clipfrac` (of all actions),
        `ratio_deviation` (the largest `|r - 1|`).
    """
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    loss = -(surrogate if weight is None else weight * surrogate).mean()
    deviation = (ratio - 1).abs().detach()
    metrics = {
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
        "clipfrac": (deviation > clip_range).float().mean(),
        "ratio_deviation": deviation.max(),
    }
    return LossOutput(loss, metrics)
