"""Loss formulas: the clipped surrogate with its clip range, the forward objectives. They return; nothing is logged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trl_tafs.method.types import LossOutput

Surrogate = Callable[[Tensor, float, Tensor], Tensor]  # (advantages, clip_range, ratio) to a loss

CLIP_RANGE = 0.025
"""Default clip range in the units of the "sqrt" reduction; measured, see docs/algorithm.md."""


LEVEL_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # of an action's std and its mean's sensitivity to the velocity
    "gaussian": lambda std, sensitivity: torch.ones_like(std),  # the density: 1 / (2 std^2) on the distance
    "uniform": lambda std, sensitivity: 2 * std.square(),  # that factor taken out: a level counts by its distance
    "balanced": lambda std, sensitivity: std / sensitivity,  # the noise moves the velocity equally at every level
}


FORWARD_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # of a clean estimate's error (T, *) and the level (T, 1...): what its square is multiplied by
    "adaptive": lambda error, level: 1 / error.abs().flatten(1).mean(1).clamp(min=1e-5).reshape(level.shape),
    "velocity": lambda error, level: level.reciprocal().square(),  # the error of the velocity, flow matching's
    "clean": lambda error, level: torch.ones_like(level),
}


def clip_range_for(reduction: str, num_elements: int, sqrt_range: float = CLIP_RANGE) -> float:
    """Return the clip range that allows the same change of the policy in the units of `reduction`.

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
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    weight: Tensor | None = None,
    surrogate: Surrogate | None = None,
) -> LossOutput:
    r"""Eq. 10, negated: `-mean(w min(r A, clip(r, e^-eps, e^eps) A))`, `r = exp(log p - log p_old)`.

    The paper's bounds are 1 -+ eps; these differ from them by eps^2 / 2, and still are bounds of a ratio where eps is
    above 1 (the "sum" reduction at high resolution).

    Args:
        log_prob: (T, M) of the present policy, with gradient.
        old_log_prob: (T, M) of the policy that sampled, same reduction.
        advantage: (T, M).
        clip_range: eps, in the units of the reduction.
        weight: (T, 1), the level weights, above 0; None for 1.
        surrogate: another formula of weighted advantages (T, M), clip range and ratio (T, M) than the above.

    Returns:
        The loss, and `approx_kl` (`mean((log r)^2) / 2`, as DDPOTrainer's), `clipfrac` (of all actions),
        `ratio_deviation` (the largest `|r - 1|`).
    """
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio.clamp(-20, 20))  # beyond, inf * 0 would be NaN
    if surrogate is not None:
        loss = surrogate(advantage if weight is None else weight * advantage, clip_range, ratio)
    else:
        bounded = ratio.clamp(math.exp(-clip_range), math.exp(clip_range))
        least = torch.minimum(ratio * advantage, bounded * advantage)
        loss = -(least if weight is None else weight * least).mean()
    metrics = {
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
        "clipfrac": (log_ratio.detach().abs() > clip_range).float().mean(),
        "ratio_deviation": (ratio.detach() - 1).abs().max(),
    }
    return LossOutput(loss, metrics)


def negative_aware(
    estimate: Tensor,
    old_estimate: Tensor,
    clean: Tensor,
    level: Tensor,
    preference: Tensor,
    nft_beta: float = 1.0,
    weighting: str = "adaptive",
) -> LossOutput:
    r"""DiffusionNFT (arXiv 2509.16117, Eq. 5): good images attract the policy, bad ones its mirror image.

    .. math:: r w^+ |\hat x^+ - x_0|^2 + (1 - r) w^- |\hat x^- - x_0|^2, \qquad
        \hat x^\pm = (1 \mp \beta) \hat x_{old} \pm \beta \hat x,

    over `beta`, the mean over elements. Where the weights are equal this is, up to a constant,
    `2 (2 r - 1) <xhat - xhat_old, xhat_old - x_0> + beta |xhat - xhat_old|^2`: matching weighted by `2 r - 1`, and a
    spring to the old policy.

    Args:
        estimate: (T, *) clean estimates of the present policy, with gradient.
        old_estimate: (T, *) of the policy that sampled.
        clean: (T, *) the images it made.
        level: (T,).
        preference: (T,) r in [0, 1], .5 for an image as good as its group.
        nft_beta: how far the implicit policies lie from the old one.
        weighting: one of `FORWARD_WEIGHTINGS`; "adaptive" (the paper's) divides by the mean absolute error.

    Returns:
        The loss, and `old_distance`, the mean square of `xhat - xhat_old`.
    """
    level = level.reshape(-1, *[1] * (clean.ndim - 1))
    step = nft_beta * (estimate - old_estimate)
    loss = torch.zeros_like(preference)
    for error, share in ((old_estimate + step - clean, preference), (old_estimate - step - clean, 1 - preference)):
        weight = FORWARD_WEIGHTINGS[weighting](error.detach(), level)
        loss = loss + share * (weight * error.square()).flatten(1).mean(1)
    distance = (estimate - old_estimate).detach().square().mean()
    return LossOutput(loss.mean() / nft_beta, {"old_distance": distance})


def matching_log_prob(estimate: Tensor, clean: Tensor, level: Tensor, weighting: str = "velocity") -> Tensor:
    """AWM's stand-in for a log-probability (arXiv 2509.25050): `-w |xhat - x_0|^2 / 2`, (T,), summed over elements.

    With "velocity" it is that of a unit Gaussian around the predicted velocity, a term of the likelihood's bound.
    """
    error = estimate - clean
    weight = FORWARD_WEIGHTINGS[weighting](error.detach(), level.reshape(-1, *[1] * (clean.ndim - 1)))
    return -0.5 * (weight * error.square()).flatten(1).sum(1)
