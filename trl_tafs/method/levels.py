"""Noise levels, and the only conversion between a level and a model's timestep.

A level `s` in [0, 1] is the share of noise: `x_s = (1 - s) x_0 + s eps` (rectified flow, diffusers' convention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_tafs.method.papers import MIX_GRPO, Paper

LEVELS = ("uniform", "scheduler")  # what the steps' levels can be: `uniform_levels`, `scheduler_levels`


def uniform_levels(num_steps: int) -> Tensor:
    r"""Return the paper's uniform division of the trajectory, `tau = T / N` (section 3.3).

    Args:
        num_steps: `N`, at least 1.

    Returns:
        (N,) float32: `1, (N - 1) / N, ..., 1 / N`, before any shift.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; sampling takes at least 1 step")
    return torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float32)


def scheduler_levels(num_steps: int, least: float) -> Tensor:
    r"""Return what diffusers' `FlowMatchEulerDiscreteScheduler.set_timesteps(N)` divides evenly, before its shift.

    Args:
        num_steps: `N`, at least 1.
        least: the scheduler's `sigma_min`. At 1,000 timesteps and a shift of 3 it is .003, the least timestep shifted
            once; shifted again, 10 steps end at .0089, where `uniform_levels` end at .25.

    Returns:
        (N,) float32: from 1 to `least`.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; sampling takes at least 1 step")
    return torch.linspace(1.0, least, num_steps, dtype=torch.float32)


def shift_levels(levels: Tensor, shift: float) -> Tensor:
    r"""Static resolution shift of SD3 (Esser et al. 2024, Eq. 23): `s' = c s / (1 + (c - 1) s)`."""
    return shift * levels / (1 + (shift - 1) * levels)


def shift_levels_exponential(levels: Tensor, mu: float) -> Tensor:
    r"""FLUX's dynamic shift, `s' = e^mu / (e^mu + 1/s - 1)`; equal to `shift_levels` with `c = e^mu`."""
    return math.exp(mu) / (math.exp(mu) + (1 / levels - 1))


def with_zero(levels: Tensor) -> Tensor:
    """Append `s_{N+1} = 0`, where sampling ends: (N,) -> (N + 1,). Levels must fall strictly."""
    levels = torch.cat([levels, levels.new_zeros(1)])
    if not bool((levels[1:] < levels[:-1]).all()):
        raise ValueError(f"levels must fall strictly towards 0, got {[round(s, 5) for s in levels.tolist()]}")
    return levels


def level_to_timestep(level: Tensor, num_train_timesteps: int = 1000) -> Tensor:
    """Return what the denoiser is told: `t = 1000 s`, float32, the same product that diffusers' scheduler takes."""
    return level * num_train_timesteps


@dataclass(frozen=True)
class SlidingWindow:
    """Which sampling steps are explored and trained in which epoch (MixGRPO, arXiv 2507.21802; Flow-GRPO-Fast).

    Args:
        size: steps in the window.
        num_steps: steps, from the first, that it ever covers.
        interval: epochs between two moves.
        order: "progressive", a step onwards each move and back to the start after the end; "random", to a place drawn
            by (seed, move), the same on every process.
        seed: of the random order.
    """

    size: int
    num_steps: int
    interval: int = 25
    order: str = "progressive"
    seed: int = 0
    paper: ClassVar[Paper | None] = MIX_GRPO

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.num_steps:
            raise ValueError(f"a window of {self.size} steps doesn't lie within {self.num_steps}")
        if self.interval < 1:
            raise ValueError(f"a window moves every {self.interval} epochs; it must be at least 1")
        if self.order not in ("progressive", "random"):
            raise ValueError(f"order is {self.order!r}; use progressive or random")

    def at(self, epoch: int) -> range:
        """Return the window's steps, 0-based, in an epoch."""
        places, move = self.num_steps - self.size + 1, epoch // self.interval
        if self.order == "random":
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + move)
            start = int(torch.randint(places, (1,), generator=generator))
        else:
            start = move % places
        return range(start, start + self.size)
