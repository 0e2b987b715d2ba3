r"""Distribution matching beside the reward (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867), for flow matching.

The gradient of `KL(policy's images || teacher's images)` by an image is the difference of the two scores at the image,
noised again. The teacher's is the frozen base's; the policy's is that of a model that is trained by flow matching on
the policy's own images, the fake score. No data are needed, and no likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_tafs.method.kernels import clean_estimate, expand
from trl_tafs.method.levels import shift_levels
from trl_tafs.method.noise import keyed_normal
from trl_tafs.method.papers import DMD2, Paper

LEAST_LEVEL = 0.02  # below, a state is its own clean image
LEAST_DISTANCE = 1e-6  # of an estimate to the teacher's, by which a direction is divided


@dataclass(frozen=True)
class Renoised:
    """Clean estimates of the policy, noised again."""

    state: Tensor  # (T, *) float32, x_t
    level: Tensor  # (T,) float32, t
    noise: Tensor  # (T, *) float32


def drawn_levels(normal: Tensor, shift: float = 1.0) -> Tensor:
    """Return levels t ~ U(.02, 1) of standard normal numbers, shifted as a schedule's (`levels.shift_levels`)."""
    uniform = LEAST_LEVEL + (1 - LEAST_LEVEL) * torch.special.ndtr(normal)
    return shift_levels(uniform, shift)


def renoised(estimate: Tensor, keys: Sequence[tuple[int | str, ...]], shift: float = 1.0) -> Renoised:
    """Return `x_t = (1 - t) xhat + t eps` of estimates (T, *), without gradient.

    `keys` are T of them: a row's level and noise are those of its key, whatever rows are beside it.
    """
    shape = tuple(estimate.shape[1:])
    draw = keyed_normal(keys, (1 + math.prod(shape),)).to(estimate.device)
    level, noise = drawn_levels(draw[:, 0], shift), draw[:, 1:].unflatten(1, shape)
    wide = expand(level, noise)
    return Renoised((1 - wide) * estimate.detach() + wide * noise, level, noise)


def matching_direction(estimate: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """Return `g = (x0_fake - x0_teacher) / mean |xhat - x0_teacher|`, (T, *), the mean over an image's elements.

    The division is DMD's: it makes the gradients of all levels equally large.

    Args:
        estimate: (T, *) of the policy, `xhat`.
        teacher: (T, *) the clean image that the teacher predicts at the re-noised estimate.
        fake: (T, *) the one that the fake score predicts there.
    """
    distance = (estimate - teacher).abs().flatten(1).mean(1).clamp_min(LEAST_DISTANCE)
    return ((fake - teacher) / expand(distance, teacher)).detach()


def matching_loss(estimate: Tensor, direction: Tensor) -> Tensor:
    """Return `<xhat, stop(g)> / D`, (T,): its gradient by an estimate is `g / D`, and its value says nothing."""
    return (estimate * direction.detach()).flatten(1).mean(1)


def fake_loss(velocity: Tensor, rows: Renoised, estimate: Tensor) -> Tensor:
    """Return flow matching's error `|v_fake(x_t) - (eps - xhat)|^2`, a mean over elements, (T,)."""
    return (velocity - (rows.noise - estimate.detach())).square().flatten(1).mean(1)


@dataclass(frozen=True)
class DistributionMatching:
    """The term that joins any objective's loss.

    Args:
        weight: of it.
        level_shift: of the levels to which estimates are noised again; 1: uniform.
    """

    weight: float
    level_shift: float = 1.0
    paper: ClassVar[Paper | None] = DMD2

    def __call__(
        self,
        estimate: Tensor,
        keys: Sequence[tuple[int | str, ...]],
        teacher: Callable[[Tensor, Tensor], Tensor],
        fake: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `w <xhat, stop(g)> / D`, the mean over T estimates (T, *) float32, and what is worth a look.

        `teacher` and `fake` are velocities of a state (T, *) at levels (T,); neither has a gradient.
        """
        rows = renoised(estimate, keys, self.level_shift)
        with torch.no_grad():
            predictions = [clean_estimate(rows.state, v(rows.state, rows.level), rows.level) for v in (teacher, fake)]
        direction = matching_direction(estimate.detach(), *predictions)
        loss = self.weight * matching_loss(estimate, direction).mean()
        return loss, {"dm_loss": loss.detach(), "dm_gap": direction.abs().mean()}
