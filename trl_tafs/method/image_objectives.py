"""Objectives that learn from clean images: the forward-process ones, and Eq. 10 on the next clean image."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_tafs.method.kernels import REDUCTIONS, clean_estimate
from trl_tafs.method.losses import FORWARD_WEIGHTINGS, matching_log_prob, matching_weight, negative_aware
from trl_tafs.method.noise import Noise
from trl_tafs.method.objective import (
    Objective,
    RatioObjective,
    check_advantages,
    check_delta,
    kl_index,
    kl_mean,
    nats_per_element,
)
from trl_tafs.method.papers import AWM, DIFFUSION_NFT, Paper
from trl_tafs.method.rollout import Velocity
from trl_tafs.method.types import Conditioning, ForwardItems, LossOutput, Rollout

MATCHED_CLIP_RANGE = 0.05
"""Default clip range of `MatchedObjective`, of the log-ratio as a mean over elements, with adaptive weights."""

MIN_LEVEL = 0.02  # of random levels: below, a state is its own clean image


@dataclass(frozen=True)
class ImageObjective(Objective):
    """What the objectives have in common that learn from clean images, each seen from a noisy state.

    Args:
        weighting: one of `losses.FORWARD_WEIGHTINGS`.
        beta: weight of half the squared distance of the velocity to the base's, a mean over elements.
    """

    weighting: str = field(default="adaptive", kw_only=True)
    beta: float = field(default=0.0, kw_only=True)
    weightings: ClassVar[Collection[str]] = FORWARD_WEIGHTINGS
    description: ClassVar[str] = "the model is moved towards those that compare well (a forward-process objective)"
    reads: ClassVar[Mapping[str, str]] = {
        "weighting": "train_level_weighting",
        "beta": "beta",
        "kl_rows": "train_kl_rows",  # of its items
    }
    warns_without_beta: ClassVar[bool] = True

    def with_old_policy(self, velocity: Velocity, items: ForwardItems, conditioning: Conditioning) -> ForwardItems:
        """Return the items with the old policy's velocities."""
        with torch.no_grad():
            return dataclasses.replace(items, old_velocity=velocity(items.state, items.level, conditioning).float())

    def without_gradient(self, items: ForwardItems) -> Tensor:
        """Without an advantage and a distance to the base there is no gradient."""
        return (items.advantage == 0).all(1) & (self.beta == 0)

    def __call__(
        self, velocity: Velocity, items: ForwardItems, conditioning: Conditioning, reference: Velocity | None = None
    ) -> LossOutput:
        """The loss of T items with their T conditionings; `reference` is needed where `beta` > 0."""
        base = self._base_velocity(items, conditioning, reference)  # before the policy's graph is held
        v = velocity(items.state, items.level, conditioning).float()
        old_v = v.detach() if items.old_velocity is None else items.old_velocity
        state = items.state.float()
        estimate, old_estimate = (clean_estimate(state, item, items.level) for item in (v, old_v))
        output = self._loss(estimate, old_estimate, items)
        if base is None:
            return output
        index = kl_index(items)
        squares = ((v if index is None else v[index]) - base).square()
        # the KL of unit Gaussians around the velocities
        kl = 0.5 * (squares.mean() if index is None else kl_mean(squares.flatten(1).mean(1), items))
        return LossOutput(output.loss + self.beta * kl, output.metrics | {"kl": kl.detach()})

    def _base_velocity(
        self, items: ForwardItems, conditioning: Conditioning, reference: Velocity | None
    ) -> Tensor | None:
        """Return the base's velocities, (t, *) float32, at the `kl_rows`; None without a distance to it."""
        if self.beta == 0.0:
            return None
        if reference is None:
            raise ValueError(f"beta is {self.beta}: the distance to the base needs its velocity as `reference`")
        index = kl_index(items)
        if index is not None and not len(index):
            return items.state[:0].float()
        state, level = (items.state, items.level) if index is None else (items.state[index], items.level[index])
        with torch.no_grad():
            return reference(state, level, conditioning if index is None else conditioning[index]).float()

    @abstractmethod
    def _loss(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> LossOutput:
        """Return the loss, given the present and the old policy's clean estimates (T, *)."""


@dataclass(frozen=True)
class RenoisedObjective(ImageObjective):
    """Images that are noised again, or matched from all the states that led to them.

    Args:
        levels: where the states come from. "trajectory": the states that led to the image, as they were; "sampler":
            the image noised to the sampler's own levels; "random": to random ones, as in the paper.
        images: "final", or "every": each scored step's clean image with its own advantage.
        num_levels: random levels of one image.
    """

    levels: str = "trajectory"
    images: str = "final"
    num_levels: int = 4
    reads: ClassVar[Mapping[str, str]] = {
        "levels": "forward_levels",
        "images": "forward_images",
        "num_levels": "forward_num_levels",
        **ImageObjective.reads,
    }

    @classmethod
    def rows_per_image(cls, options: Any) -> int:
        """Return the number of its clean images that are matched, times the levels of each."""
        if options.forward_levels == "trajectory":
            return options.num_trained_steps
        levels = {"sampler": options.sample_num_steps, "random": options.forward_num_levels}[options.forward_levels]
        return levels * (1 if cls.scores_final_image(options) else options.num_trained_steps)

    @classmethod
    def scores_final_image(cls, options: Any) -> bool:
        """Return whether `forward_images` is "final"."""
        return options.forward_images == "final"

    @classmethod
    def rollout_needs(cls, options: Any) -> frozenset[str]:
        """Return the states of the trajectory and every step's clean estimate, where they are matched."""
        states = {"states"} if options.forward_levels == "trajectory" else set()
        return frozenset(states if cls.scores_final_image(options) else states | {"clean"})

    def items(self, rollout: Rollout, advantages: Tensor, noise: Noise) -> ForwardItems:
        """Return the items of B images: an image's clean images in turn, each at its levels. Advantages (B, S, 1)."""
        check_advantages(advantages, (len(rollout.final), len(rollout.steps), 1))
        advantage = advantages[..., 0]  # (B, S)
        if self.images == "final":
            clean, advantage = rollout.final[:, None], advantage[:, -1:]
        else:
            clean = rollout.clean[:, rollout.steps + 1]  # (B, S, *)
        if self.levels == "trajectory":
            clean, advantage = clean.expand_as(rollout.states), advantage.expand(len(clean), len(rollout.steps))
            level = rollout.levels[rollout.steps].expand_as(advantage)
            state = rollout.states
        else:
            level = self._levels(rollout, clean.shape[1], noise)  # (B, images, levels)
            draw = noise("forward", 0, (*level.shape[1:], *clean.shape[2:]))
            wide = level.reshape(*level.shape, *[1] * (clean.ndim - 2))
            clean = clean.unsqueeze(2)
            state = ((1 - wide) * clean + wide * draw).to(rollout.path.dtype)
            clean, advantage = clean.expand(state.shape).flatten(1, 2), advantage.unsqueeze(2).expand_as(level)
            level, advantage, state = level.flatten(1), advantage.flatten(1), state.flatten(1, 2)
        batch, count = level.shape
        return ForwardItems(
            state=state.flatten(0, 1),
            clean=clean.flatten(0, 1).float(),
            level=level.flatten(),
            advantage=advantage.flatten().unsqueeze(1).to(level),
            sample=torch.arange(batch).repeat_interleave(count),
        )

    def _levels(self, rollout: Rollout, images: int, noise: Noise) -> Tensor:
        """(B, images, K): the sampler's N, or `num_levels` drawn from (MIN_LEVEL, 1), evenly spread."""
        batch = len(rollout.final)
        if self.levels == "sampler":
            return rollout.levels[:-1].expand(batch, images, -1)
        shape = (images, self.num_levels)
        uniform = torch.special.ndtr(noise("forward_level", 0, shape))
        strata = torch.arange(self.num_levels, device=uniform.device)
        return MIN_LEVEL + (1 - MIN_LEVEL) * (strata + uniform) / self.num_levels


@dataclass(frozen=True)
class ForwardObjective(RenoisedObjective):
    r"""DiffusionNFT (arXiv 2509.16117) on few-step rollouts: no likelihood, no action, only images and advantages.

    An item is a noisy state and a clean image; the loss is `losses.negative_aware`. Its gradient on policy is
    `A (xhat - x_0)`: towards a good image, away from a bad one. What is noise to it is the spread of the images, not
    the D-dimensional noise of an action.

    Args:
        nft_beta: distance of the implicit policies from the old one, see `losses.negative_aware`.
        adv_clip: an advantage of +- this is a preference of 1 or 0.
    """

    nft_beta: float = 1.0
    adv_clip: float = 5.0
    default_weighting: ClassVar[str | None] = "adaptive"
    paper: ClassVar[Paper | None] = DIFFUSION_NFT
    default_beta: ClassVar[float] = 0.2
    reads: ClassVar[Mapping[str, str]] = {
        **RenoisedObjective.reads,
        "nft_beta": "nft_beta",
        "adv_clip": "train_adv_clip_max",
    }

    def without_gradient(self, items: ForwardItems) -> Tensor:
        """Return none where the old policy is known: the spring to it pulls at every item."""
        return super().without_gradient(items) & (items.old_velocity is None)

    def _loss(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> LossOutput:
        preference = (0.5 + 0.5 * items.advantage[:, 0] / self.adv_clip).clamp(0, 1)
        output = negative_aware(
            estimate, old_estimate, items.clean, items.level, preference, self.nft_beta, self.weighting
        )
        return LossOutput(self.adv_clip * output.loss, output.metrics)


@dataclass(frozen=True, kw_only=True)
class MatchingLoss(RatioObjective, ImageObjective):
    """The surrogate on `losses.matching_log_prob`, in the place of an action's log-density."""

    clip_range: float = 0.025
    reduction: str = "sqrt"

    def __post_init__(self) -> None:
        check_delta(self.delta, self.clip_range)

    def without_gradient(self, items: ForwardItems) -> Tensor:
        """Without an advantage and a distance to the base or to the old policy there is no gradient."""
        held = self.beta > 0 or (self.old_beta > 0 and items.old_velocity is not None)
        return ~self.pulled_by_advantage(items.advantage) & (not held)

    def _log_probs(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> tuple[Tensor, Tensor]:
        """Return the stand-ins for the present and the old log-probability, (T, 1), in the units of the reduction."""
        scale = REDUCTIONS[self.reduction](items.clean[0].numel())
        new, old = (
            scale * matching_log_prob(item, items.clean, items.level, self.weighting)
            for item in (estimate, old_estimate)
        )
        return new[:, None], old[:, None].detach()

    def _loss(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> LossOutput:
        kl = None
        if self.reads_old_policy and items.old_velocity is not None:
            weight = matching_weight(old_estimate, items.clean, items.level, self.weighting)
            kl = 0.5 * (weight * (estimate - old_estimate).square()).flatten(1).mean(1)
        unit = nats_per_element(items.clean[0].numel(), self.reduction)
        log_probs = self._log_probs(estimate, old_estimate, items)
        return self._surrogate(log_probs, items.advantage, self.clip_range, unit, kl)


@dataclass(frozen=True)
class MatchingObjective(MatchingLoss, RenoisedObjective):
    """Advantage-weighted matching (AWM, arXiv 2509.25050): the clipped surrogate on `losses.matching_log_prob`.

    On policy its gradient is that of `ForwardObjective` with equal weights; off policy it is held by a clip range, not
    by a spring.
    """

    weighting: str = field(default="velocity", kw_only=True)
    default_weighting: ClassVar[str | None] = "velocity"
    paper: ClassVar[Paper | None] = AWM
    reads: ClassVar[Mapping[str, str]] = {**RenoisedObjective.reads, **RatioObjective.ratio_reads}


@dataclass(frozen=True)
class MatchedObjective(MatchingLoss):
    r"""Eq. 10 with the next clean image as the action of the state before it (docs/algorithm.md, "Matched").

    .. math:: p_\theta(x_0^{n+1} | x_n) = N(\hat x_\theta(x_n), \sigma_n^2 I), \qquad
        -\frac{1}{S} \sum_n \min(r_n A^{n+1}, clip(r_n) A^{n+1}), \quad
        r_n = \frac{p_\theta(x_0^{n+1} | x_n)}{p_{old}(x_0^{n+1} | x_n)},

    on the rollout's own states. The chain is `x_n -> xhat_n -> x_{n+1} -> xhat_{n+1} = x_0^{n+1}`: given `x_n`, the
    next clean image is random through the re-noising. Its density has no closed form; the Gaussian around what the
    policy predicts at `x_n` stands in for it. On policy the gradient by `xhat_n` is
    `-A (x_0^{n+1} - xhat_n) / sigma_n^2`: towards the next image where that compares well, away where it doesn't.

    `weighting` says sigma_n^2. "adaptive": the old policy's mean absolute error at this row, the same in numerator and
    denominator of the ratio. The pull is then of size |A| however far the next image lies, so that the distance to the
    base, whose pull grows with the distance, ends every push away (docs/algorithm.md). "clean": 1; "velocity":
    `s_n^2`. With these the push grows with the distance as well, and nothing ends it where it is the stronger one.
    """

    weighting: str = field(default="adaptive", kw_only=True)
    reduction: str = field(default="mean", kw_only=True)
    default_weighting: ClassVar[str | None] = "adaptive"
    default_reduction: ClassVar[str] = "mean"
    default_beta: ClassVar[float] = 0.1
    description: ClassVar[str] = (
        "each step's prediction is moved to the next clean image or away from it, by how that compares (a clipped "
        "policy gradient)"
    )
    reads: ClassVar[Mapping[str, str]] = {**ImageObjective.reads, **RatioObjective.ratio_reads}

    @classmethod
    def default_clip_range(cls, reduction: str, num_elements: int) -> float:
        """Return .05 in the units of "mean", and as much in those of another reduction.

        The action is no independent noise: it has the structure that the change has, so that their product, which
        "sqrt" units would let grow with D, spreads as widely at every D in "mean" units (docs/algorithm.md).
        """
        return MATCHED_CLIP_RANGE * nats_per_element(num_elements, reduction)

    @classmethod
    def rows_per_image(cls, options: Any) -> int:
        """Return S, the trained steps."""
        return options.num_trained_steps

    @classmethod
    def rollout_needs(cls, options: Any) -> frozenset[str]:
        """Return the states, and the clean estimates."""
        return frozenset({"states", "clean"})

    def items(self, rollout: Rollout, advantages: Tensor, noise: Noise | None = None) -> ForwardItems:
        """Return the items of B images: `x_n` with `x_0^{n+1}` and its advantage, of (B, S, 1), step by step."""
        check_advantages(advantages, (len(rollout.final), len(rollout.steps), 1))
        batch, steps = rollout.states.shape[:2]
        level = rollout.levels[rollout.steps].repeat(batch)
        return ForwardItems(
            state=rollout.states.flatten(0, 1),
            clean=rollout.clean[:, rollout.steps + 1].flatten(0, 1).float(),
            level=level,
            advantage=advantages.flatten(0, 1).to(level),
            sample=torch.arange(batch).repeat_interleave(steps),
        )

    def _log_probs(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> tuple[Tensor, Tensor]:
        scale = REDUCTIONS[self.reduction](items.clean[0].numel())
        weight = matching_weight(old_estimate, items.clean, items.level, self.weighting)
        new, old = (
            -0.5 * scale * (weight * (item - items.clean).square()).flatten(1).sum(1)
            for item in (estimate, old_estimate)
        )
        return new[:, None], old[:, None].detach()
