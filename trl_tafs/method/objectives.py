"""What is minimised: an objective makes its minibatch items from a rollout and its loss from a velocity function.

Rollout, rewards and credit don't know which one is used. `ClippedObjective` is Eq. 10, on the actions of the rollout;
the forward ones need only clean images and their advantages. What holds for an objective before there is a rollout
(how many items it makes of an image, what of a rollout it reads, its weightings) stands on its class.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trl_tafs.method.kernels import REDUCTIONS, Kernel, clean_estimate, expand
from trl_tafs.method.losses import (
    FORWARD_WEIGHTINGS,
    LEVEL_WEIGHTINGS,
    Surrogate,
    clipped_surrogate,
    matching_log_prob,
    negative_aware,
)
from trl_tafs.method.noise import Noise
from trl_tafs.method.parts import Part
from trl_tafs.method.rollout import KEPT, Velocity, replay
from trl_tafs.method.types import Conditioning, ForwardItems, LossOutput, Rollout, Transitions

MIN_LEVEL = 0.02  # of random levels: below, a state is its own clean image


@dataclass(frozen=True)
class Objective(Part, ABC):
    """What the trainer asks of an objective: a frozen dataclass, whose own options `objective_kwargs` sets.

    The class methods are given the options (`options.MethodOptions`) before anything is made.
    """

    from_actions: ClassVar[bool] = False  # it learns from the kernel's actions and their density, or from clean images
    weightings: ClassVar[Collection[str]] = ()  # what `train_level_weighting` can be
    default_weighting: ClassVar[str | None] = None
    default_beta: ClassVar[float] = 0.0
    reads: ClassVar[Mapping[str, str]] = {"beta": "beta"}
    description: ClassVar[str] = "the model is trained by an objective of its own"  # ends "..., and ..."

    @classmethod
    def from_options(cls, options: Any, kernel: Kernel, clip_range: float) -> Self:
        """Return the objective that the options ask for, for rollouts of `kernel`.

        `clip_range` is `train_clip_range`, or its default at the latent's size.
        """
        resolved = {"kernel": kernel, "clip_range": clip_range}
        for name in ("weighting", "level_weighting"):
            resolved[name] = options.level_weighting
        takes = cls._fields()
        return cls._made(options, "objective_kwargs", **{name: v for name, v in resolved.items() if name in takes})

    @classmethod
    @abstractmethod
    def rows_per_image(cls, options: Any) -> int:
        """Return how many items `items` makes of one image."""

    @classmethod
    def scores_final_image(cls, options: Any) -> bool:
        """Return whether only the image that the sampler returns is scored, whatever the credit rule."""
        return False

    @classmethod
    def rollout_needs(cls, options: Any) -> frozenset[str]:
        """Return which of `rollout.KEPT` the items are made from; nothing else is kept of a rollout."""
        return KEPT

    @abstractmethod
    def items(self, rollout: Rollout, advantages: Tensor, noise: Noise) -> Any:
        """Return the minibatch items of B images: a `TensorRecord` with fields `sample` (T,) and `advantage`.

        All images have equally many, `rows_per_image`, and come in their order. Advantages are (B, S, M).
        """

    def with_old_policy(self, velocity: Velocity, items: Any, conditioning: Conditioning) -> Any:
        """Return the items with what the loss needs of the policy that sampled, before an update moves the policy."""
        return items

    @abstractmethod
    def without_gradient(self, items: Any) -> Tensor:
        """Return which items can't move the policy, (T,) bool."""

    @abstractmethod
    def __call__(
        self, velocity: Velocity, items: Any, conditioning: Conditioning, reference: Velocity | None = None
    ) -> LossOutput:
        """Return the loss of T items with their T conditionings; `reference` is the base without the adapter."""


def check_advantages(advantages: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if advantages aren't of the shape of a rollout's actions, (B, S, M)."""
    if advantages.shape != shape:
        raise ValueError(f"advantages {tuple(advantages.shape)} for actions {tuple(shape)}")


@dataclass(frozen=True)
class ClippedObjective(Objective):
    """GRPO's clipped surrogate on the kernel's actions (Eq. 10), with a KL to the adapter-free base.

    Args:
        kernel: the one that rolled out.
        clip_range: in the units of `reduction`.
        reduction: of the log-probabilities, the rollout's.
        level_weighting: "gaussian", "uniform" or "balanced", see `losses.LEVEL_WEIGHTINGS`.
        beta: weight of `KL(policy || base)`, in nats per latent element.
    """

    kernel: Kernel
    clip_range: float
    reduction: str = "sqrt"
    level_weighting: str = "gaussian"
    beta: float = 0.0
    from_actions: ClassVar[bool] = True
    weightings: ClassVar[Collection[str]] = LEVEL_WEIGHTINGS
    default_weighting: ClassVar[str | None] = "balanced"
    description: ClassVar[str] = (
        "each step is made more or less likely by how its images compare (a clipped policy gradient)"
    )
    reads: ClassVar[Mapping[str, str]] = {
        "clip_range": "train_clip_range",
        "reduction": "train_log_prob_reduction",
        "level_weighting": "train_level_weighting",
        "beta": "beta",
    }

    @classmethod
    def rows_per_image(cls, options: Any) -> int:
        """Return S, the trained steps."""
        return options.num_trained_steps

    @classmethod
    def rollout_needs(cls, options: Any) -> frozenset[str]:
        """Return all but the clean estimates."""
        return KEPT - {"clean"}

    def items(self, rollout: Rollout, advantages: Tensor, noise: Noise | None = None) -> Transitions:
        """Flatten a rollout of B images and S steps, with its advantages (B, S, M), to B * S items."""
        batch, steps = rollout.states.shape[:2]
        check_advantages(advantages, rollout.log_probs.shape)
        return Transitions(
            state=rollout.states.flatten(0, 1),
            action=rollout.actions.flatten(0, 1),
            level=rollout.levels[rollout.steps].repeat(batch),
            next_level=rollout.levels[rollout.steps + 1].repeat(batch),
            old_log_prob=rollout.log_probs.flatten(0, 1),
            advantage=advantages.to(rollout.log_probs).flatten(0, 1),
            sample=torch.arange(batch).repeat_interleave(steps),
        )

    def without_gradient(self, items: Transitions) -> Tensor:
        """Without an advantage and a KL there is no gradient."""
        return (items.advantage == 0).all(1) & (self.beta == 0)

    def __call__(
        self,
        velocity: Velocity,
        items: Transitions,
        conditioning: Conditioning,
        reference: Velocity | None = None,
        surrogate: Surrogate | None = None,
    ) -> LossOutput:
        """The loss of T items with their T conditionings; `reference` is needed where `beta` > 0.

        `surrogate` is another formula than Eq. 10's, see `losses.clipped_surrogate`.
        """
        policy = replay(velocity, self.kernel, items, conditioning)
        sensitivity = expand(self.kernel.sensitivity(items.level, items.next_level), items.state)
        weight = LEVEL_WEIGHTINGS[self.level_weighting](policy.std, sensitivity).reshape(-1, 1)
        log_prob = policy.log_prob(items.action, self.reduction)
        output = clipped_surrogate(log_prob, items.old_log_prob, items.advantage, self.clip_range, weight, surrogate)
        if self.beta == 0.0:
            return output
        if reference is None:
            raise ValueError(f"beta is {self.beta}: the KL term needs the base policy's velocity as `reference`")
        with torch.no_grad():
            base = replay(reference, self.kernel, items, conditioning)
        kl = policy.kl(base, "mean").mean()
        return LossOutput(output.loss + self.beta * kl, output.metrics | {"kl": kl.detach()})


@dataclass(frozen=True)
class ImageObjective(Objective):
    """What the objectives have in common that learn from clean images: states noised from them, or that led to them.

    Args:
        levels: where the states come from. "trajectory": the states that led to the image, as they were; "sampler":
            the image noised to the sampler's own levels; "random": to random ones, as in the paper.
        images: "final", or "every": each scored step's clean image with its own advantage.
        num_levels: random levels of one image.
        weighting: one of `losses.FORWARD_WEIGHTINGS`.
        beta: weight of the squared distance of the velocity to the base's, a mean over elements.
    """

    levels: str = "trajectory"
    images: str = "final"
    num_levels: int = 4
    weighting: str = "adaptive"
    beta: float = 0.0
    weightings: ClassVar[Collection[str]] = FORWARD_WEIGHTINGS
    description: ClassVar[str] = "the model is moved towards those that compare well (a forward-process objective)"
    reads: ClassVar[Mapping[str, str]] = {
        "levels": "forward_levels",
        "images": "forward_images",
        "num_levels": "forward_num_levels",
        "weighting": "train_level_weighting",
        "beta": "beta",
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
        v = velocity(items.state, items.level, conditioning).float()
        old_v = v.detach() if items.old_velocity is None else items.old_velocity
        state = items.state.float()
        estimate, old_estimate = (clean_estimate(state, item, items.level) for item in (v, old_v))
        output = self._loss(estimate, old_estimate, items)
        if self.beta == 0.0:
            return output
        if reference is None:
            raise ValueError(f"beta is {self.beta}: the distance to the base needs its velocity as `reference`")
        with torch.no_grad():
            base = reference(items.state, items.level, conditioning).float()
        kl = 0.5 * (v - base).square().mean()  # the KL of unit Gaussians around the velocities
        return LossOutput(output.loss + self.beta * kl, output.metrics | {"kl": kl.detach()})

    @abstractmethod
    def _loss(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> LossOutput:
        """Return the loss, given the present and the old policy's clean estimates (T, *)."""


@dataclass(frozen=True)
class ForwardObjective(ImageObjective):
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
    default_beta: ClassVar[float] = 0.2
    reads: ClassVar[Mapping[str, str]] = {
        **ImageObjective.reads,
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


@dataclass(frozen=True)
class MatchingObjective(ImageObjective):
    """Advantage-weighted matching (AWM, arXiv 2509.25050): the clipped surrogate on `losses.matching_log_prob`.

    On policy its gradient is that of `ForwardObjective` with equal weights; off policy it is held by a clip range, not
    by a spring.
    """

    weighting: str = "velocity"
    clip_range: float = 0.025
    reduction: str = "sqrt"
    default_weighting: ClassVar[str | None] = "velocity"
    reads: ClassVar[Mapping[str, str]] = {
        **ImageObjective.reads,
        "clip_range": "train_clip_range",
        "reduction": "train_log_prob_reduction",
    }

    def _loss(self, estimate: Tensor, old_estimate: Tensor, items: ForwardItems) -> LossOutput:
        scale = REDUCTIONS[self.reduction](items.clean[0].numel())
        new, old = (
            scale * matching_log_prob(item, items.clean, items.level, self.weighting)
            for item in (estimate, old_estimate)
        )
        return clipped_surrogate(new[:, None], old[:, None].detach(), items.advantage, self.clip_range)


OBJECTIVES: dict[str, type[Objective]] = {
    "clipped": ClippedObjective,
    "forward": ForwardObjective,
    "awm": MatchingObjective,
}
