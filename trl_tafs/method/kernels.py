r"""Transition kernels: how one step of the sampler becomes an action with a density.

Notation: `x` the state at level `s`, `v` the velocity predicted there, `s_next` the next level, all (B, \*) or
broadcast against it; `eps` is noise of unit variance. The clean estimate is `xhat = x - s v` (paper Eq. 4, 6).

A kernel says which steps carry an action (`trained_steps`), the action's distribution (`transition`), the state
that follows (`next_state`), and which clean images its actions answer for (`reward_lag`). What holds for a kernel
whatever its options (whether it anneals, whether it has a density, the limits of its eta) stands on its class.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trl_tafs.method.papers import DANCE_GRPO, FLOW_CPS, FLOW_GRPO, Paper
from trl_tafs.method.parts import Part

LOG_2PI = math.log(2 * math.pi)


REDUCTIONS = {
    "mean": lambda num_elements: 1.0 / num_elements,
    "sqrt": lambda num_elements: 1.0 / math.sqrt(num_elements),
    "sum": lambda num_elements: 1.0,
}


def expand(level: Tensor, x: Tensor) -> Tensor:
    """Return a level, () or (B,), shaped so that it broadcasts against `x` (B, *)."""
    return level if level.ndim == 0 else level.reshape(-1, *[1] * (x.ndim - 1))


def clean_estimate(x: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Return the one-step prediction of the clean image, `xhat = x - s v` (Eq. 4 and 6), (B, *)."""
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
        return density.flatten(first).sum(-1) * REDUCTIONS[reduction](self.mean.shape[1:].numel())


@dataclass(frozen=True)
class Kernel(Part, ABC):
    """What rollout and replay ask of a kernel, and the defaults of a stochastic one.

    A field `eta` is set by `sample_eta`, whose default it gives; other fields of a subclass by `sampler_kwargs`.
    """

    num_actions: int = field(default=1, kw_only=True)  # M, actions drawn at a trained state
    antithetic: bool = field(default=False, kw_only=True)  # the second half of them has the noise of the first, negated

    has_density: ClassVar[bool] = True  # False: the path is deterministic; its states are kept, nothing is chosen
    anneals: ClassVar[bool] = False  # what it trains is published for `stochastic_sampling`; else for the ODE
    action_is_state: ClassVar[bool] = False  # the first action of a state is the next state, as `next_state` returns it
    renoises: ClassVar[bool] = False  # `next_state` adds noise that is no action
    reward_lag: ClassVar[int] = 1  # 1: credited with the next step's clean estimate; 0: the action is the scored image
    largest_eta: ClassVar[float] = math.inf
    description: ClassVar[str] = "are drawn by a stochastic sampler"  # ends "the model's own 4-step samples ..."
    reads: ClassVar[Mapping[str, str]] = {
        "num_actions": "num_perturbations",
        "antithetic": "antithetic_perturbations",
        "eta": "sample_eta",
    }

    def __post_init__(self) -> None:
        if self.num_actions < 1:
            raise ValueError(f"num_actions is {self.num_actions}; a state needs at least one action")
        if self.antithetic and self.num_actions % 2:
            raise ValueError(f"num_actions is {self.num_actions}; antithetic actions come in pairs, use an even number")
        eta = getattr(self, "eta", None)
        if eta is not None and not 0 < eta <= self.largest_eta:
            raise ValueError(
                f"eta is {eta}; it must lie in (0, {self.largest_eta:g}] (0 is the ODE, without a density)"
            )

    @classmethod
    def default_eta(cls) -> float | None:
        """Return the default of the field `eta`; None for a kernel without one."""
        eta = cls._fields().get("eta")
        return None if eta is None or eta.default is dataclasses.MISSING else float(eta.default)

    @classmethod
    def from_options(cls, options: Any) -> Self:
        """Return the kernel that `sampling_options.SamplingOptions` ask for; raise ValueError if they don't fit it."""
        return cls._made(options, "sampler_kwargs")

    @property
    def scores_mean(self) -> bool:
        """Whether the unexplored mean is scored beside the actions, as their baseline."""
        return False

    def trained_steps(self, num_steps: int) -> range:
        """Return the steps, 0-based, that carry an action: by default all but the last, which leads to the image."""
        return range(num_steps - 1)

    @abstractmethod
    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """Return the distribution of the action."""

    @abstractmethod
    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """Return how far the action's mean moves with the velocity, |d mean / d v|, of the shape of `s`."""

    @abstractmethod
    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """Return the state at `s_next`; `action` is None at a step that isn't trained."""


@dataclass(frozen=True)
class Annealed(Kernel):
    r"""Temperature annealing (Eq. 5 and 7), the default: the action is the next noisy state.

    .. math:: x_{n+1} = (1 - s_{n+1}) \hat x_n + s_{n+1} \epsilon.

    At `eta` = 1 this is diffusers' `stochastic_sampling`, bit for bit. Below 1 a part of the predicted noise is
    kept, `mean = (1 - s') xhat + sqrt(s'^2 - std^2) x1`, `std = s' sin(eta pi / 2)` (Flow-CPS, `Cps`), and the Euler
    ODE is reached at 0, where there is no density. The coefficients (1 - s', s') are those of the flow at every eta;
    the variance of the states is below the flow's, since `xhat` is a mean.

    With M = `num_actions` above 1 every trained state branches: M re-noisings of one clean estimate, each evaluated
    once more for the clean image that it leads to, and that image scored. Siblings share their state, so that its own
    value is their baseline. The trajectory goes on from the first.
    """

    eta: float = 1.0
    anneals: ClassVar[bool] = True
    action_is_state: ClassVar[bool] = True
    largest_eta: ClassVar[float] = 1.0
    description: ClassVar[str] = "are noised again between steps"

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
class Cps(Annealed):
    """Flow-CPS (arXiv 2509.05952): `Annealed` with a part of the predicted noise kept, its `eta` .8.

    Its authors evaluate by the ODE, and so is published what it trains.
    """

    eta: float = 0.8
    anneals: ClassVar[bool] = False
    description: ClassVar[str] = "are noised again in part between steps (Flow-CPS)"
    paper: ClassVar[Paper | None] = FLOW_CPS


@dataclass(frozen=True)
class Clean(Kernel):
    r"""The other reading of Eq. 10: the action is the clean image, explored explicitly.

    .. math:: x_0^n = \hat x_n + \kappa s_n \xi, \qquad p = N(\hat x_n, (\kappa s_n)^2 I), \quad n = 2..N.

    The reward is that of the *explored* image. M explorations of one mean cost no evaluation of the denoiser;
    they are each other's baseline, and the trajectory goes on from the first. With M = 1 and `baseline="state"`
    the mean itself is scored too.
    """

    kappa: float = 0.5
    baseline: str = "state"  # "state": the state's own; "group": Eq. 9's mean over the group alone
    anneals: ClassVar[bool] = True
    renoises: ClassVar[bool] = True
    reward_lag: ClassVar[int] = 0
    description: ClassVar[str] = "are noised again between steps, around clean images that are explored"
    reads: ClassVar[Mapping[str, str]] = {**Kernel.reads, "kappa": "sample_kappa", "baseline": "clean_baseline"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kappa > 0:
            raise ValueError(f"kappa is {self.kappa}; exploration needs it above 0")
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


def euler(x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
    """One step of the probability-flow ODE, `x + (s' - s) v`, (B, *)."""
    return x + (expand(s_next, x) - expand(s, x)) * v


@dataclass(frozen=True)
class Sde(Kernel):
    r"""Euler-Maruyama steps of an SDE with the flow's own marginals, whatever its diffusion `g`.

    .. math:: x' = x + v\, dt - \tfrac{g^2}{2} \nabla \log p_s(x)\, dt + g \sqrt{-dt}\, \epsilon, \quad dt = s' - s < 0,

    with the score `-(x - (1 - s) xhat) / s^2 = -(x + (1 - s) v) / s`, so that the mean is
    `x (1 + g^2 dt / 2s) + v (1 + g^2 (1 - s) / 2s) dt`. Only as steps are refined are the marginals the flow's: at few
    steps the variance falls short. `FlowSde` and `DanceSde` differ in `g` alone; `eta` = 0 is the Euler ODE, without a
    density. The last step is Euler's: noise added there would stay in the image.
    """

    eta: float = 0.7
    action_is_state: ClassVar[bool] = True
    description: ClassVar[str] = "are drawn by an SDE"

    @abstractmethod
    def diffusion(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`g`, of the shape of `s`."""

    def trained_steps(self, num_steps: int) -> range:
        """All but the last, which is the ODE's."""
        return range(num_steps - 1)

    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """`N(x (1 + g^2 dt / 2s) + v (1 + g^2 (1 - s) / 2s) dt, -g^2 dt I)`."""
        g = expand(self.diffusion(s, s_next), x)
        s, dt = expand(s, x), expand(s_next - s, x)
        drift = g.square() / (2 * s)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - s)) * dt
        return Transition(mean, g * torch.sqrt(-dt))

    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`|dt| (1 + g^2 (1 - s) / 2s)`."""
        return (s - s_next) * (1 + self.diffusion(s, s_next).square() * (1 - s) / (2 * s))

    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """The action itself; an Euler step where there is none."""
        return euler(x, v, s, s_next) if action is None else action


@dataclass(frozen=True)
class FlowSde(Sde):
    """Flow-GRPO's (arXiv 2505.05470, Eq. 9): `g = eta sqrt(s / (1 - s))`, at s = 1 with the next level below the root.

    More noise where the level is high. `eta` is the paper's a, .7.
    """

    eta: float = 0.7
    description: ClassVar[str] = "are drawn by Flow-GRPO's SDE"
    paper: ClassVar[Paper | None] = FLOW_GRPO

    def diffusion(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`eta sqrt(s / (1 - s~))`, `s~` being the next level at s = 1, where it would be infinite."""
        return self.eta * torch.sqrt(s / (1 - torch.where(s >= 1, s_next, s)))


@dataclass(frozen=True)
class DanceSde(Sde):
    """DanceGRPO's (arXiv 2505.07818): `g = eta` at every level, .3 in its recipe."""

    eta: float = 0.3
    description: ClassVar[str] = "are drawn by DanceGRPO's SDE"
    paper: ClassVar[Paper | None] = DANCE_GRPO

    def diffusion(self, s: Tensor, s_next: Tensor) -> Tensor:
        """`eta`."""
        return torch.full_like(s, self.eta)


@dataclass(frozen=True)
class Ode(Kernel):
    """The Euler solver, `x + (s' - s) v`: no density. For evaluation, and for objectives that need none."""

    has_density: ClassVar[bool] = False
    action_is_state: ClassVar[bool] = True
    description: ClassVar[str] = "are drawn by the ODE"

    def trained_steps(self, num_steps: int) -> range:
        """All but the last, as the stochastic kernels, so that their states are kept."""
        return range(num_steps - 1)

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
        return euler(x, v, s, s_next)


@dataclass(frozen=True)
class Windowed(Kernel):
    """Another kernel inside a window of steps, the Euler ODE outside (MixGRPO, arXiv 2507.21802).

    Only the window's steps are explored and trained. `levels.SlidingWindow` says where it lies in which epoch.
    """

    kernel: Kernel
    window: range  # 0-based steps

    def __post_init__(self) -> None:
        for fact in Kernel.__annotations__:  # what isn't about the window is the inner kernel's
            object.__setattr__(self, fact, getattr(self.kernel, fact))

    @property
    def scores_mean(self) -> bool:
        """The kernel's."""
        return self.kernel.scores_mean

    def trained_steps(self, num_steps: int) -> range:
        """The window's, as far as the kernel trains them."""
        own = self.kernel.trained_steps(num_steps)
        return range(max(own.start, self.window.start), min(own.stop, self.window.stop))

    def transition(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Transition:
        """The kernel's."""
        return self.kernel.transition(x, v, s, s_next)

    def sensitivity(self, s: Tensor, s_next: Tensor) -> Tensor:
        """The kernel's."""
        return self.kernel.sensitivity(s, s_next)

    def next_state(
        self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, action: Tensor | None, noise: Tensor
    ) -> Tensor:
        """The kernel's where there is an action, Euler's elsewhere."""
        return euler(x, v, s, s_next) if action is None else self.kernel.next_state(x, v, s, s_next, action, noise)


KERNELS: dict[str, type[Kernel]] = {
    "annealed": Annealed,
    "clean": Clean,
    "flow_sde": FlowSde,
    "dance_sde": DanceSde,
    "cps": Cps,
    "ode": Ode,
}
