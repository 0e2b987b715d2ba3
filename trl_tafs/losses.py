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

    The range limits `|log r|`, and a log-ratio in "sum" units is sqrt(D) times that in "sqrt" units, D times that in
    "mean" units: with these ranges the same actions are clipped whichever reduction is used.

    A relative change e of the mean, `|mean - mean_old| = e std` an element, moves the joint log-ratio by
    `e sqrt(D) z`, z a standard normal, so that the same limit on e is c in "sqrt" units, `c sqrt(D)` in "sum" and
    `c / sqrt(D)` in "mean" units: .025 is .2 and .003 at D = 64, 6.4 and 1e-4 at D = 65,536. The log-ratio also
    drifts by `-e^2 sqrt(D) / 2` in "sqrt" units, which reaches the range at e = .079 at D = 64, e = .014 at 65,536.
    """
    root = math.sqrt(num_elements)
    return sqrt_range * {"sqrt": 1.0, "sum": root, "mean": 1 / root}[reduction]


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float, weight: Tensor | None = None
) -> LossOutput:
    r"""Eq. 10, negated: `-mean(w min(r A, clip(r, e^-eps, e^eps) A))`, `r = exp(log p - log p_old)`.

    The paper's bounds are 1 -+ eps; these differ from them by eps^2 / 2, and still are bounds of a ratio where eps is
    above 1 (the "sum" reduction at high resolution).

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
    ratio = torch.exp(log_ratio.clamp(-20, 20))  # beyond, inf * 0 would be NaN
    bounded = ratio.clamp(math.exp(-clip_range), math.exp(clip_range))
    surrogate = torch.minimum(ratio * advantage, bounded * advantage)
    loss = -(surrogate if weight is None else weight * surrogate).mean()
    metrics = {
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
        "clipfrac": (log_ratio.detach().abs() > clip_range).float().mean(),
        "ratio_deviation": (ratio.detach() - 1).abs().max(),
    }
    return LossOutput(loss, metrics)
