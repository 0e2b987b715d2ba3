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


LEVEL_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    # of an action's std, its mean's sensitivity to the velocity, and the gap to the next level
    "gaussian": lambda std, sensitivity, gap: torch.ones_like(std),  # the density: 1 / (2 std^2) on the distance
    "uniform": lambda std, sensitivity, gap: 2 * std.square(),  # that factor taken out: a level counts by its distance
    "balanced": lambda std, sensitivity, gap: std / sensitivity,  # noise moves the velocity equally at every level
    "std": lambda std, sensitivity, gap: std,  # TempFlow-GRPO's: a level counts by how much it explores
    "diffusion": lambda std, sensitivity, gap: std / gap.sqrt(),  # SuperFlow's: g of the SDE whose step it is
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
    delta: float | None = None,
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
        delta: bound of r itself, above e^eps: where A < 0 the loss is at most `-delta A` (dual clip); None for none.
        surrogate: another formula of weighted advantages (T, M), clip range and ratio (T, M) than the above.

    Returns:
        The loss, and `approx_kl` (`mean((log r)^2) / 2`, as DDPOTrainer's), `clipfrac` (of all actions),
        `clipfrac_positive` and `clipfrac_negative` (those of them that the clip takes the gradient from, by the sign
        of A, as shares of all actions), `ratio_deviation` (the largest `|r - 1|`).
    """
    log_ratio = log_prob - old_log_prob
    ratio = _bounded_ratio(log_ratio, delta)
    if surrogate is not None:
        loss = surrogate(advantage if weight is None else weight * advantage, clip_range, ratio)
    else:
        bounded = ratio.clamp(math.exp(-clip_range), math.exp(clip_range))
        least = torch.minimum(ratio * advantage, bounded * advantage)
        loss = -(least if weight is None else weight * least).mean()
    outside, still = log_ratio.detach().abs() > clip_range, advantage * log_ratio.detach() > 0
    return LossOutput(loss, _ratio_metrics(log_ratio, ratio, advantage, outside, outside & still))


def masked_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    far: Tensor,
    weight: Tensor | None = None,
    delta: float | None = None,
) -> LossOutput:
    r"""Flow-DPPO's surrogate (arXiv 2606.11025), negated: `-mean(w r A)` over the actions that aren't left out.

    Left out is an action whose advantage pushes the policy further away (A > 0 and r > 1, or A < 0 and r < 1) where
    that is `far` from the old one already. What leads back is kept, however far. A ratio is a noisy sample of how far
    the policy went; for Gaussians the KL is known exactly.

    Args:
        log_prob: (T, M) of the present policy, with gradient.
        old_log_prob: (T, M) of the policy that sampled, same reduction.
        advantage: (T, M).
        far: (T, M) bool, whether the KL to the old policy is past its limit.
        weight: (T, 1), the level weights; None for 1.
        delta: as for `clipped_surrogate`.

    Returns:
        The loss, and the metrics of `clipped_surrogate`, an action that is left out being a clipped one.
    """
    log_ratio = log_prob - old_log_prob
    ratio = _bounded_ratio(log_ratio, delta)
    dropped = far & (advantage * log_ratio.detach() > 0)
    surrogate = torch.where(dropped, torch.zeros_like(ratio), ratio * advantage)
    loss = -(surrogate if weight is None else weight * surrogate).mean()
    return LossOutput(loss, _ratio_metrics(log_ratio, ratio, advantage, dropped, dropped))


def _bounded_ratio(log_ratio: Tensor, delta: float | None) -> Tensor:
    ratio = torch.exp(log_ratio.clamp(-20, 20))  # beyond, inf * 0 would be NaN
    return ratio if delta is None else ratio.clamp(max=delta)


def _ratio_metrics(
    log_ratio: Tensor, ratio: Tensor, advantage: Tensor, clipped: Tensor, without_gradient: Tensor
) -> dict[str, Tensor]:
    return {
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
        "clipfrac": clipped.float().mean(),
        "clipfrac_positive": (without_gradient & (advantage > 0)).float().mean(),
        "clipfrac_negative": (without_gradient & (advantage < 0)).float().mean(),
        "ratio_deviation": (ratio.detach() - 1).abs().max(),
    }


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


def matching_weight(estimate: Tensor, clean: Tensor, level: Tensor, weighting: str) -> Tensor:
    """Return what the square of an estimate's error is multiplied by, broadcasting against (T, *); no gradient."""
    level = level.reshape(-1, *[1] * (clean.ndim - 1))
    return FORWARD_WEIGHTINGS[weighting]((estimate - clean).detach(), level)


def matching_log_prob(estimate: Tensor, clean: Tensor, level: Tensor, weighting: str = "velocity") -> Tensor:
    """AWM's stand-in for a log-probability (arXiv 2509.25050): `-w |xhat - x_0|^2 / 2`, (T,), summed over elements.

    With "velocity" it is that of a unit Gaussian around the predicted velocity, a term of the likelihood's bound.
    """
    weight = matching_weight(estimate, clean, level, weighting)
    return -0.5 * (weight * (estimate - clean).square()).flatten(1).sum(1)
