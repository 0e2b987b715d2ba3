"""What is minimised: an objective makes its minibatch items from a rollout and its loss from a velocity function.

Rollout, rewards and credit don't know which one is used. `ClippedObjective` is Eq. 10, on the actions of the rollout;
those of `image_objectives` need only clean images and their advantages. What holds for an objective before there is a
rollout (how many items it makes of an image, what of a rollout it reads, its weightings) stands on its class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_tafs.method.image_objectives import ForwardObjective, MatchedObjective, MatchingObjective
from trl_tafs.method.kernels import Kernel, Transition, expand
from trl_tafs.method.losses import LEVEL_WEIGHTINGS, Surrogate
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
from trl_tafs.method.rollout import KEPT, Velocity, replay
from trl_tafs.method.types import Conditioning, LossOutput, Rollout, Transitions


@dataclass(frozen=True)
class ClippedObjective(RatioObjective):
    """GRPO's clipped surrogate on the kernel's actions (Eq. 10), with a KL to the adapter-free base.

    What else holds it: see `objective.RatioObjective`.

    Args:
        kernel: the one that rolled out.
        clip_range: in the units of `reduction`.
        reduction: of the log-probabilities, the rollout's.
        level_weighting: one of `losses.LEVEL_WEIGHTINGS`.
        clip_weighting: "loss", the level weights multiply the loss, and all levels have one clip range; "ratio", they
            are exponents of the ratio, whose clip range then is in the weights' units (Flow-CPS's code, which has the
            squared distance alone, "uniform", in its ratio).
        beta: weight of `KL(policy || base)`, in nats per latent element.
        kl_weighting: "gaussian", the KL of the two densities; "diffusion", that times the gap to the next level,
            `|m - m_base|^2 / (2 g^2)`, which is Flow-GRPO's code.
    """

    kernel: Kernel
    clip_range: float
    reduction: str = "sqrt"
    level_weighting: str = "gaussian"
    beta: float = 0.0
    kl_weighting: str = "gaussian"
    clip_weighting: str = "loss"
    from_actions: ClassVar[bool] = True
    weightings: ClassVar[Collection[str]] = LEVEL_WEIGHTINGS
    default_weighting: ClassVar[str | None] = "balanced"
    description: ClassVar[str] = (
        "each step is made more or less likely by how its images compare (a clipped policy gradient)"
    )
    reads: ClassVar[Mapping[str, str]] = {
        **RatioObjective.ratio_reads,
        "level_weighting": "train_level_weighting",
        "clip_weighting": "train_clip_weighting",
        "beta": "beta",
        "kl_weighting": "train_kl_weighting",
        "kl_rows": "train_kl_rows",  # of its items
    }

    def __post_init__(self) -> None:
        check_delta(self.delta, self.clip_range)

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

    def with_old_policy(self, velocity: Velocity, items: Transitions, conditioning: Conditioning) -> Transitions:
        """Return the items with the old policy's velocities, where its mean is needed."""
        if not self.reads_old_policy:
            return items
        with torch.no_grad():
            return dataclasses.replace(items, old_velocity=velocity(items.state, items.level, conditioning).float())

    def without_gradient(self, items: Transitions) -> Tensor:
        """Without an advantage and a KL there is no gradient."""
        held = self.beta > 0 or (self.old_beta > 0 and items.old_velocity is not None)
        return ~self.pulled_by_advantage(items.advantage) & (not held)

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
        base = self._base(items, conditioning, reference)  # before the policy's graph is held
        policy = replay(velocity, self.kernel, items, conditioning)
        sensitivity = expand(self.kernel.sensitivity(items.level, items.next_level), items.state)
        gap = expand(items.level - items.next_level, items.state)
        weight = LEVEL_WEIGHTINGS[self.level_weighting](policy.std, sensitivity, gap).reshape(-1, 1)
        log_prob = policy.log_prob(items.action, self.reduction)
        kl = None
        if items.old_velocity is not None:
            state = items.state.float()
            old = self.kernel.transition(state, items.old_velocity, items.level, items.next_level)
            kl = policy.kl(old, "mean")
        unit = nats_per_element(items.state[0].numel(), self.reduction)
        log_probs, weighted = (log_prob, items.old_log_prob), self.clip_weighting == "ratio"
        output = self._surrogate(log_probs, items.advantage, self.clip_range, unit, kl, weight, surrogate, weighted)
        if base is None:
            return output
        index = kl_index(items)
        if index is not None:
            policy = Transition(policy.mean[index], policy.std[index] if policy.std.ndim else policy.std)
            gap = gap[index]
        kl = policy.kl(base, "mean")
        kl = kl_mean(kl if self.kl_weighting == "gaussian" else kl * gap.flatten(), items)
        return LossOutput(output.loss + self.beta * kl, output.metrics | {"kl": kl.detach()})

    def _base(self, items: Transitions, conditioning: Conditioning, reference: Velocity | None) -> Transition | None:
        """Return what the base gives to the actions, at the `kl_rows`; None without a KL."""
        if self.beta == 0.0:
            return None
        if reference is None:
            raise ValueError(f"beta is {self.beta}: the KL term needs the base policy's velocity as `reference`")
        index = kl_index(items)
        if index is not None and not len(index):
            return Transition(items.state[:0].float(), items.state.new_ones((), dtype=torch.float32))
        with torch.no_grad():
            if index is None:
                return replay(reference, self.kernel, items, conditioning)
            return replay(reference, self.kernel, items[index], conditioning[index])


OBJECTIVES: dict[str, type[Objective]] = {
    "clipped": ClippedObjective,
    "matched": MatchedObjective,
    "forward": ForwardObjective,
    "awm": MatchingObjective,
}
