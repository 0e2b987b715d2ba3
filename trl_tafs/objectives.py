"""What is minimised: an objective makes its minibatch rows from a rollout and its loss from a velocity function.

An objective has `rows(rollout, advantages) -> Rows` (with a field `sample`, the image a row belongs to) and
`__call__(velocity, rows, conditioning, reference) -> LossOutput`; rollout, rewards and credit don't know which one
is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_tafs.kernels import Kernel
from trl_tafs.losses import LEVEL_WEIGHTINGS, clipped_surrogate
from trl_tafs.rollout import Velocity, replay
from trl_tafs.types import Conditioning, LossOutput, Rollout, Transitions


@dataclass(frozen=True)
class ClippedObjective:
    """GRPO's clipped surrogate on the kernel's actions (Eq. 10), with a KL to the adapter-free base.

    Args:
        kernel: the one that rolled out.
        clip_range: in the units of `reduction`.
        reduction: of the log-probabilities, the rollout's.
        level_weighting: "gaussian" or "uniform", see `losses.LEVEL_WEIGHTINGS`.
        beta: weight of `KL(policy || base)`, in nats per latent element.
    """

    kernel: Kernel
    clip_range: float
    reduction: str = "sqrt"
    level_weighting: str = "gaussian"
    beta: float = 0.0

    def rows(self, rollout: Rollout, advantages: Tensor) -> Transitions:
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

    def __call__(
        self, velocity: Velocity, rows: Transitions, conditioning: Conditioning, reference: Velocity | None = None
    ) -> LossOutput:
        """The loss of T rows with their T conditionings; `reference` is needed where `beta` > 0."""
        policy = replay(velocity, self.kernel, rows, conditioning)
        weight = LEVEL_WEIGHTINGS[self.level_weighting](policy.std).reshape(-1, 1)
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


OBJECTIVES = {"clipped": ClippedObjective}
