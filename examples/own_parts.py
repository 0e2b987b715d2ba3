"""A kernel, a credit rule and an objective of one's own, registered by name; docs/extending.md explains them.

trl-tafs train --import examples/own_parts.py --sample_kernel tapered --objective unclipped --prompts prompts.txt
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_tafs.method.credit import CREDITS
from trl_tafs.method.kernels import KERNELS, Sde
from trl_tafs.method.objectives import OBJECTIVES, ClippedObjective
from trl_tafs.method.rollout import replay
from trl_tafs.method.types import LossOutput


@dataclass(frozen=True)
class TaperedSde(Sde):
    """g = eta s^power: as noisy as the state."""

    eta: float = 1.0  # set by sample_eta, whose default this is
    power: float = 1.0  # set by sampler_kwargs
    description: ClassVar[str] = "are drawn by an SDE whose noise falls with the level"

    def diffusion(self, s: Tensor, s_next: Tensor) -> Tensor:
        """Of the shape of s."""
        return self.eta * s**self.power


def discounted(per_step: Tensor, gamma: float = 0.5) -> Tensor:
    """Reward-to-go with a discount: the later image counts less. (B, n, K), gamma set by credit_kwargs."""
    credit = torch.zeros_like(per_step)
    following = torch.zeros_like(per_step[:, 0])
    for n in reversed(range(per_step.shape[1])):
        credit[:, n] = following = per_step[:, n] + gamma * following
    return credit


class UnclippedObjective(ClippedObjective):
    """-mean(r A): the importance-weighted policy gradient."""

    description: ClassVar[str] = "each step is made more or less likely by how its images compare"

    def __call__(self, velocity, items, conditioning, reference=None) -> LossOutput:
        """The loss of T items with their T conditionings."""
        policy = replay(velocity, self.kernel, items, conditioning)
        log_ratio = policy.log_prob(items.action, self.reduction) - items.old_log_prob
        loss = -(log_ratio.exp() * items.advantage).mean()
        return LossOutput(loss, {"approx_kl": 0.5 * log_ratio.detach().square().mean(), "clipfrac": torch.zeros(())})


KERNELS["tapered"], CREDITS["discounted"], OBJECTIVES["unclipped"] = TaperedSde, discounted, UnclippedObjective
