r"""Transition kernels: how one step of the sampler becomes an action with a density.

Notation: `x` the state at level `s`, `v` the velocity predicted there, `s_next` the next level, all (B, \*) or
broadcast against it; `eps` is noise of unit variance. The clean estimate is `xhat = x - s v` (paper Eq. 4, 6).

A kernel says which steps carry an action (`trained_steps`), the action's distribution (`transition`), the state
that follows (`next_state`), and which clean images its actions answer for (`reward_lag`: 1 when an action at
step n is credited with the clean estimate of step n + 1, 0 when it is itself the image that is scored).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)

REDUCTIONS = {
    "mean": lambda num_elements: 1.0 / num_elements,
    "sqrt": lambda num_elements: 1.0 / math.sqrt(num_elements),
    "sum": lambda num_elements: 1.0,
}


def expand(level: Tensor, x: Tensor) -> Tensor:
    """A level, () or (B,), shaped so that it broadcasts against `x` (B, *)."""
    return level if level.ndim == 0 else level.reshape(-1, *[1] * (x.ndim - 1))


def clean_estimate(x: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """The one-step prediction of the clean image, `xhat = x - s v` (Eq. 4 and 6), (B, *)."""
    return x - expand(s, x) * v


@dataclass(frozen=True)
class Transition:
    """An isotropic Gaussian over actions, `N(mean, std^2 I)`."""

    mean: Tensor  # (B, *) float32
    std: Tensor  # () or (B, 1, ...) float32, > 0

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std noise`. Noise (B, *) gives (B, *); noise (B, M, *) gives M actions a state."""
        mean, std = self._aligned(noise)
        return mean + std * noise

    def log_prob(self, action: Tensor, reduction: str = "sum") -> Tensor:
        """Log-density of `action` (B, *) or (B, M, *): returns (B,) or (B, M), in nats.

        `reduction` says of what: "sum", the joint density; "mean", per latent element, so that the exponential
        of a difference is the D-th root of the joint ratio; "sqrt", the sum over sqrt(D), whose spread on a
        given relative change of the mean doesn't depend on D.
        """
        mean, std = self._aligned(action)
        z = (action.to(mean.dtype) - mean) / std
        density = -0.5 * z.square() - torch.log(std) - 0.5 * LOG_2PI
        return self._reduce(density, action.ndim, reduction)

    def kl(self, other: Transition, reduction: str = "mean") -> Tensor:
        """KL(self || other), (B,), in nats, reduced as `log_prob` is. Differentiable in both."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        density = 0.5 * (distance + ratio - 1 - torch.log(ratio))
        return self._reduce(density, self.mean.ndim, reduction)

    def _aligned(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std with an axis for the M actions, if `action` has one."""
        if action.ndim == self.mean.ndim:
            return self.mean, self.std
        return self.mean.unsqueeze(1), self.std if self.std.ndim == 0 else self.std.unsqueeze(1)

    def _reduce(self, density: Tensor, ndim: int, reduction: str) -> Tensor:
        first = ndim - (self.mean.ndim - 1)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
        return density.flatten(first).sum(-1) * REDUCTIONS[reduction](self.mean[0].numel())


class Kernel(Protocol):
    """What rollout and replay ask of a kernel."""

    num_actions: int  # M, actions drawn at a trained state
    reward_lag: int  # 1: credited with the next step's clean estimate; 0: the action is the scored image
    scores_mean: bool  # the unexplored mean is scored beside the actions, as their baseline
    renoises: bool  # `next_state` adds noise that is no action
    antithetic: bool  # the second half of a state's actions has the noise of the first, negated

    def trained_steps(self, num_steps: int) -> range:
        """The steps, 0-based, whose action has a density."""

    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """The distribution of the action."""

    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """How far the action's mean moves with the velocity, |d mean / d v|, of the shape of `s`."""

    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """The state at `s_next`; `action` is None at a step that isn't trained."""


def _check_actions(num_actions: int, antithetic: bool) -> None:
    if num_actions < 1:
        raise ValueError(f"num_actions is {num_actions}; a state needs at least one action")
    if antithetic and num_actions % 2:
        raise ValueError(f"num_actions is {num_actions}; antithetic actions come in pairs, use an even number")


@dataclass(frozen=True)
class Annealed:
    r"""Temperature annealing (Eq. 5 and 7), the default: the action is the next noisy state.

    .. math:: x_{n+1} = (1 - s_{n+1}) \hat x_n + s_{n+1} \epsilon.

    At `eta` = 1 this is diffusers' `stochastic_sampling`, bit for bit. Below 1 a part of the predicted noise is
    kept, `mean = (1 - s') xhat + sqrt(s'^2 - std^2) x1`, `std = s' sin(eta pi / 2)` (Flow-CPS, arXiv 2509.05952),
    and the Euler ODE is reached at 0, where there is no density.

    With M = `num_actions` above 1 every trained state branches: M re-noisings of one clean estimate, each evaluated
    once more for the clean image that it leads to, and that image scored. Siblings share their state, so that its own
    value is their baseline. The trajectory goes on from the first.
    """

    eta: float = 1.0
    num_actions: int = 1
    antithetic: bool = False
    reward_lag: int = 1
    scores_mean: bool = False
    renoises: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must lie in (0, 1] (0 is the ODE, without a density)")
        _check_actions(self.num_actions, self.antithetic)

    def trained_steps(self, num_steps: int) -> range:
        """All but the last: `s_{N+1} = 0` has no density."""
        return range(num_steps - 1)

    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """`N((1 - s') xhat, s'^2 I)` at eta = 1."""
        s_next = expand(s_next, x)
        mean = (1.0 - s_next) * clean_estimate(x, v, s)
        if self.eta == 1.0:
            return Transition(mean, s_next)
        std = s_next * math.sin(self.eta * math.pi / 2)
        noise_estimate = x + (1.0 - expand(s, x)) * v
        return Transition(mean + s_next * math.cos(self.eta * math.pi / 2) * noise_estimate, std)

    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`(1 - s') s` at eta = 1."""
        kept = 0.0 if self.eta == 1.0 else math.cos(self.eta * math.pi / 2)
        return ((1 - s_next) * s - kept * s_next * (1 - s)).abs()

    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """The action itself; at the last step the clean estimate."""
        return clean_estimate(x, v, s) if action is None else action


@dataclass(frozen=True)
class Clean:
    r"""The other reading of Eq. 10: the action is the clean image, explored explicitly.

    .. math:: x_0^n = \hat x_n + \kappa s_n \xi, \qquad p = N(\hat x_n, (\kappa s_n)^2 I), \quad n = 2..N.

    The reward is that of the *explored* image. M explorations of one mean cost no evaluation of the denoiser;
    they are each other's baseline, and the trajectory goes on from the first. With M = 1 and `baseline="state"`
    the mean itself is scored too.
    """

    kappa: float = 0.5
    num_actions: int = 1
    antithetic: bool = False
    baseline: str = "state"  # "state": the state's own; "group": Eq. 9's mean over the group alone
    reward_lag: int = 0
    renoises: bool = True

    def __post_init__(self) -> None:
        if not self.kappa > 0:
            raise ValueError(f"kappa is {self.kappa}; exploration needs it above 0")
        _check_actions(self.num_actions, self.antithetic)
        if self.baseline not in ("state", "group"):
            raise ValueError(f"baseline is {self.baseline!r}; use state or group")

    @property
    def scores_mean(self) -> bool:
        """Whether the mean is decoded and scored: only where it is the one baseline there is."""
        return self.baseline == "state" and self.num_actions == 1

    def trained_steps(self, num_steps: int) -> range:
        """All but the first: no action led to it, and the paper skips its reward."""
        return range(1, num_steps)

    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """`N(xhat, (kappa s)^2 I)`."""
        return Transition(clean_estimate(x, v, s), self.kappa * expand(s, x))

    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`s`."""
        return s

    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """Re-noise the explored image, or the estimate where nothing is explored (Eq. 5)."""
        clean = clean_estimate(x, v, s) if action is None else action
        s_next = expand(s_next, x)
        return (1.0 - s_next) * clean + s_next * noise


@dataclass(frozen=True)
class Ode:
    """The Euler solver, `x + (s' - s) v`: no action, no density; for evaluation."""

    num_actions: int = 1
    antithetic: bool = False
    reward_lag: int = 1
    scores_mean: bool = False
    renoises: bool = False

    def trained_steps(self, num_steps: int) -> range:
        """None."""
        return range(0)

    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """Nothing to explore: an error."""
        raise ValueError("the ODE sampler is deterministic and has no density; train with Annealed or Clean")

    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`s - s'`."""
        return s - s_next

    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """One Euler step."""
        return x + (expand(s_next, x) - expand(s, x)) * v


KERNELS = {"annealed": Annealed, "clean": Clean}  # those that can be trained
