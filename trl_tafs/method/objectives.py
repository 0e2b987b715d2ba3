"""What is minimised: an objective makes its minibatch rows from a rollout and its loss from a velocity function.

Rollout, rewards and credit don't know which one is used. `ClippedObjective` is Eq. 10, on the actions of the rollout;
the forward ones need only clean images and their advantages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trl_tafs.method.kernels import REDUCTIONS, Kernel, clean_estimate, expand
from trl_tafs.method.losses import LEVEL_WEIGHTINGS, clipped_surrogate, matching_log_prob, negative_aware
from trl_tafs.method.noise import Noise
from trl_tafs.method.rollout import Velocity, replay
from trl_tafs.method.types import Conditioning, ForwardRows, LossOutput, Rollout, Transitions

MIN_LEVEL = 0.02  # of random levels: below, a state is its own clean image


class Objective(Protocol):
    """What the trainer asks of an objective."""

    from_actions: ClassVar[bool]  # whether it learns from the kernel's actions and their density, or from clean images

    def rows(self, rollout: Rollout, advantages: Tensor, noise: Noise) -> Any:
        """Rows of B images, equally many each and in their order, with fields `sample` (T,) and `advantage`."""

    def observe(self, velocity: Velocity, rows: Any, conditioning: Conditioning) -> Any:
        """The rows with what the loss needs of the policy that sampled; called where that may have moved on."""

    def idle(self, rows: Any) -> Tensor:
        """(T,) bool: rows that can't move the policy."""

    def __call__(
        self, velocity: Velocity, rows: Any, conditioning: Conditioning, reference: Velocity | None = None
    ) -> LossOutput:
        """The loss of T rows with their T conditionings; `reference` is the base without the adapter."""


@dataclass(frozen=True)
class ClippedObjective:
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

    def rows(self, rollout: Rollout, advantages: Tensor, noise: Noise | None = None) -> Transitions:
        """Flatten a rollout of B images and S steps, with its advantages (B, S, M), to B * S rows."""
        batch, steps = rollout.states.shape[:2]
        if advantages.shape != rollout.log_probs.shape:
            raise ValueError(f"advantages {tuple(advantages.shape)} for actions {tuple(rollout.log_probs.shape)}")
        rows = Transitions(
            state=rollout.states.flatten(0, 1),
            action=rollout.actions.flatten(0, 1),
            level=rollout.levels[rollout.steps].repeat(batch),
            next_level=rollout.levels[rollout.steps + 1].repeat(batch),
            old_log_prob=rollout.log_probs.flatten(0, 1),
            advantage=advantages.to(rollout.log_probs).flatten(0, 1),
            sample=torch.arange(batch).repeat_interleave(steps),
        )
        return rows

    def observe(self, velocity: Velocity, rows: Transitions, conditioning: Conditioning) -> Transitions:
        """The rows as they are: the rollout kept the log-probabilities."""
        return rows

    def idle(self, rows: Transitions) -> Tensor:
        """Without an advantage and a KL there is no gradient."""
        return (rows.advantage == 0).all(1) & (self.beta == 0)

    def __call__(
        self, velocity: Velocity, rows: Transitions, conditioning: Conditioning, reference: Velocity | None = None
    ) -> LossOutput:
        """The loss of T rows with their T conditionings; `reference` is needed where `beta` > 0."""
        policy = replay(velocity, self.kernel, rows, conditioning)
        sensitivity = expand(self.kernel.sensitivity(rows.level, rows.next_level), rows.state)
        weight = LEVEL_WEIGHTINGS[self.level_weighting](policy.std, sensitivity).reshape(-1, 1)
        log_prob = policy.log_prob(rows.action, self.reduction)
        output = clipped_surrogate(log_prob, rows.old_log_prob, rows.advantage, self.clip_range, weight)
        if self.beta == 0.0:
            return output
        if reference is None:
            raise ValueError(f"beta is {self.beta}: the KL term needs the base policy's velocity as `reference`")
        with torch.no_grad():
            base = replay(reference, self.kernel, rows, conditioning)
        kl = policy.kl(base, "mean").mean()
        return LossOutput(output.loss + self.beta * kl, output.metrics | {"kl": kl.detach()})


@dataclass(frozen=True)
class ForwardObjective:
    r"""DiffusionNFT (arXiv 2509.16117) on few-step rollouts: no likelihood, no action, only images and advantages.

    A row is a noisy state and a clean image; the loss is `losses.negative_aware`. Its gradient on policy is
    `A (xhat - x_0)`: towards a good image, away from a bad one. What is noise to it is the spread of the images, not
    the D-dimensional noise of an action.

    Args:
        levels: where the states come from. "trajectory": the states that led to the image, as they were; "sampler":
            the image noised to the sampler's own levels; "random": to random ones, as in the paper.
        images: "final", or "every": each scored step's clean image with its own advantage.
        num_levels: random levels of one image.
        nft_beta: distance of the implicit policies from the old one, see `losses.negative_aware`.
        adv_clip: an advantage of +- this is a preference of 1 or 0.
        weighting: one of `losses.FORWARD_WEIGHTINGS`.
        beta: weight of the squared distance of the velocity to the base's, a mean over elements.
    """

    levels: str = "trajectory"
    images: str = "final"
    num_levels: int = 4
    nft_beta: float = 1.0
    adv_clip: float = 5.0
    weighting: str = "adaptive"
    beta: float = 0.0
    from_actions: ClassVar[bool] = False

    def rows(self, rollout: Rollout, advantages: Tensor, noise: Noise) -> ForwardRows:
        """Rows of B images: an image's clean images in turn, each at its levels. Advantages (B, S, 1)."""
        if advantages.shape != rollout.log_probs.shape or advantages.shape[2] != 1:
            raise ValueError(f"advantages {tuple(advantages.shape)} for actions {tuple(rollout.log_probs.shape)}")
        clean, advantage = rollout.clean[:, rollout.steps + 1], advantages[..., 0]  # (B, S, *) and (B, S)
        if self.images == "final":
            clean, advantage = rollout.final[:, None], advantage[:, -1:]
        if self.levels == "trajectory":
            clean, advantage = clean.expand_as(rollout.states), advantage.expand(len(clean), len(rollout.steps))
            level = rollout.levels[rollout.steps].expand_as(advantage)
            state = rollout.states
        else:
            level = self._levels(rollout, clean.shape[1], noise)  # (B, images, levels)
            draw = noise("forward", 0, (*level.shape[1:], *clean.shape[2:]))
            wide = level.reshape(*level.shape, *[1] * (clean.ndim - 2))
            clean = clean.unsqueeze(2)
            state = ((1 - wide) * clean + wide * draw).to(rollout.states.dtype)
            clean, advantage = clean.expand(state.shape).flatten(1, 2), advantage.unsqueeze(2).expand_as(level)
            level, advantage, state = level.flatten(1), advantage.flatten(1), state.flatten(1, 2)
        batch, count = level.shape
        return ForwardRows(
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

    def observe(self, velocity: Velocity, rows: ForwardRows, conditioning: Conditioning) -> ForwardRows:
        """The rows with the old policy's velocities."""
        with torch.no_grad():
            return dataclasses.replace(rows, old_velocity=velocity(rows.state, rows.level, conditioning).float())

    def idle(self, rows: ForwardRows) -> Tensor:
        """None: the spring to the old policy pulls at every row that was observed."""
        on_policy = rows.old_velocity is None and self.beta == 0
        return (rows.advantage == 0).all(1) & on_policy

    def __call__(
        self, velocity: Velocity, rows: ForwardRows, conditioning: Conditioning, reference: Velocity | None = None
    ) -> LossOutput:
        """The loss of T rows with their T conditionings; `reference` is needed where `beta` > 0."""
        v = velocity(rows.state, rows.level, conditioning).float()
        old_v = v.detach() if rows.old_velocity is None else rows.old_velocity
        output = self._loss(*(clean_estimate(rows.state.float(), item, rows.level) for item in (v, old_v)), rows)
        if self.beta == 0.0:
            return output
        if reference is None:
            raise ValueError(f"beta is {self.beta}: the distance to the base needs its velocity as `reference`")
        with torch.no_grad():
            base = reference(rows.state, rows.level, conditioning).float()
        kl = 0.5 * (v - base).square().mean()  # the KL of unit Gaussians around the velocities
        return LossOutput(output.loss + self.beta * kl, output.metrics | {"kl": kl.detach()})

    def _loss(self, estimate: Tensor, old_estimate: Tensor, rows: ForwardRows) -> LossOutput:
        preference = (0.5 + 0.5 * rows.advantage[:, 0] / self.adv_clip).clamp(0, 1)
        output = negative_aware(
            estimate, old_estimate, rows.clean, rows.level, preference, self.nft_beta, self.weighting
        )
        return LossOutput(self.adv_clip * output.loss, output.metrics)


@dataclass(frozen=True)
class MatchingObjective(ForwardObjective):
    """Advantage-weighted matching (AWM, arXiv 2509.25050): the clipped surrogate on `losses.matching_log_prob`.

    On policy its gradient is that of `ForwardObjective` with equal weights; off policy it is held by a clip range, not
    by a spring.
    """

    weighting: str = "velocity"
    clip_range: float = 0.025
    reduction: str = "sqrt"

    def idle(self, rows: ForwardRows) -> Tensor:
        """Without an advantage and a distance to the base there is no gradient."""
        return (rows.advantage == 0).all(1) & (self.beta == 0)

    def _loss(self, estimate: Tensor, old_estimate: Tensor, rows: ForwardRows) -> LossOutput:
        scale = REDUCTIONS[self.reduction](rows.clean[0].numel())
        new, old = (
            scale * matching_log_prob(item, rows.clean, rows.level, self.weighting) for item in (estimate, old_estimate)
        )
        return clipped_surrogate(new[:, None], old[:, None].detach(), rows.advantage, self.clip_range)


OBJECTIVES = {"clipped": ClippedObjective, "forward": ForwardObjective, "awm": MatchingObjective}
