"""What the trainer asks of an objective, and what those have in common that clip a ratio."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trl_tafs.method.kernels import REDUCTIONS, Kernel
from trl_tafs.method.losses import Surrogate, clip_range_for, clipped_surrogate, masked_surrogate
from trl_tafs.method.noise import Noise
from trl_tafs.method.parts import Part
from trl_tafs.method.rollout import KEPT, Velocity
from trl_tafs.method.types import Conditioning, LossOutput, Rollout, onto


@dataclass(frozen=True)
class Objective(Part, ABC):
    """What the trainer asks of an objective: a frozen dataclass, whose own options `objective_kwargs` sets.

    The class methods are given the options (`options.MethodOptions`) before anything is made.
    """

    from_actions: ClassVar[bool] = False  # it learns from the kernel's actions and their density, or from clean images
    weightings: ClassVar[Collection[str]] = ()  # what `train_level_weighting` can be
    default_weighting: ClassVar[str | None] = None
    default_reduction: ClassVar[str] = "sqrt"  # of log-probabilities: what holds a change alike at every D
    default_beta: ClassVar[float] = 0.0
    warns_without_beta: ClassVar[bool] = False  # nothing but a distance to the base bounds it
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
        resolved["reduction"] = options.log_prob_reduction
        takes = cls._fields()
        return cls._made(options, "objective_kwargs", **{name: v for name, v in resolved.items() if name in takes})

    @classmethod
    def default_clip_range(cls, reduction: str, num_elements: int) -> float:
        """Return the clip range for latents of D elements, in the units of a reduction."""
        return clip_range_for(reduction, num_elements)

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


def kl_index(items: Any) -> Tensor | None:
    """Return which of T items the distance to the base is taken at, (t,) int64; None: all."""
    return (
        None
        if items.kl_rows is None
        else onto(torch.tensor(items.kl_rows.places, dtype=torch.int64), items.state.device)
    )


def kl_mean(kl: Tensor, items: Any) -> Tensor:
    """Return the mean over T items of a distance that is known at `kl_rows` of them, (t,)."""
    return kl.mean() if items.kl_rows is None else items.kl_rows.weight * kl.sum() / len(items)


def check_advantages(advantages: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if advantages aren't of the shape of a rollout's actions, (B, S, M)."""
    if advantages.shape != shape:
        raise ValueError(f"advantages {tuple(advantages.shape)} for actions {tuple(shape)}")


@dataclass(frozen=True, kw_only=True)
class RatioObjective(Objective):
    r"""An objective of `r A`, r a ratio of the present policy's density to the old one's: what holds the policy there.

    Of all but `negative_weight` nothing is felt while the policy is the old one: they act from the second optimizer
    step of an epoch on, or on rollouts of a lagging old policy.

    Args:
        center_ratio: clip `log r + KL(old || policy)`. The log-ratio of two Gaussians of one deviation is
            `<a - m_old, m - m_old> / sigma^2 - |m - m_old|^2 / (2 sigma^2)`; the second term, which pushes all ratios
            down whatever the action and grows with D, is taken out (GRPO-Guard, arXiv 2510.22319). What is left is
            linear in the change, and is clipped as often above as below.
        kl_limit: instead of the clip, leave out the actions whose advantage pushes the policy away from the old one
            where the KL is past this, in nats per latent element (Flow-DPPO, arXiv 2606.11025).
        delta: where A < 0, a ratio above this counts as this (TRL's `delta`; dual-clip PPO, arXiv 1912.09729).
        negative_weight: what advantages below 0 are multiplied by.
        old_beta: weight of `KL(policy || old policy)`, in nats per latent element (PPO's KL penalty).
    """

    center_ratio: bool = False
    kl_limit: float | None = None
    delta: float | None = None
    negative_weight: float = 1.0
    old_beta: float = 0.0
    ratio_reads: ClassVar[Mapping[str, str]] = {
        "clip_range": "train_clip_range",
        "reduction": "train_log_prob_reduction",
        "center_ratio": "train_center_ratio",
        "kl_limit": "train_kl_limit",
        "delta": "delta",
        "negative_weight": "train_negative_weight",
        "old_beta": "old_policy_beta",
    }

    @property
    def reads_old_policy(self) -> bool:
        """Whether the loss needs the old policy's mean, not its log-probabilities alone."""
        return self.center_ratio or self.kl_limit is not None or self.old_beta > 0

    def pulled_by_advantage(self, advantage: Tensor) -> Tensor:
        """Return where any of an item's advantages (T, M) counts, (T,) bool."""
        return (self._weighted(advantage) != 0).any(1)

    def _weighted(self, advantage: Tensor) -> Tensor:
        if self.negative_weight == 1.0:
            return advantage
        return torch.where(advantage < 0, self.negative_weight * advantage, advantage)

    def _surrogate(
        self,
        log_probs: tuple[Tensor, Tensor],
        advantage: Tensor,
        clip_range: float,
        unit: float,
        kl: Tensor | None = None,
        weight: Tensor | None = None,
        formula: Surrogate | None = None,
        weighted_ratio: bool = False,
    ) -> LossOutput:
        """Return the surrogate's loss with what holds it.

        Args:
            log_probs: (T, M) of the present policy, with gradient, and of the old one, same reduction.
            advantage: (T, M).
            clip_range: in the units of the reduction.
            unit: D times `REDUCTIONS[reduction](D)`, what makes of nats per element those units.
            kl: (T,) to the old policy, in nats per latent element, with gradient; None: the policy is the old one.
            weight: (T, 1), the level weights.
            formula: another one than the clipped surrogate's; without a `kl_limit`.
            weighted_ratio: the weights are exponents of the ratio, before it is clipped, and no factors of the loss:
                the same gradient on policy.
        """
        log_prob, old_log_prob = log_probs
        advantage = self._weighted(advantage)
        if self.center_ratio and kl is not None:
            log_prob = log_prob + unit * kl[:, None]
        if weighted_ratio and weight is not None:
            log_prob, old_log_prob, weight = weight * log_prob, weight * old_log_prob, None
        if self.kl_limit is None:
            output = clipped_surrogate(log_prob, old_log_prob, advantage, clip_range, weight, self.delta, formula)
        else:
            far = torch.zeros_like(advantage) if kl is None else kl.detach()[:, None].expand_as(advantage)
            output = masked_surrogate(log_prob, old_log_prob, advantage, far > self.kl_limit, weight, self.delta)
        if kl is None:
            return output
        loss = output.loss + self.old_beta * kl.mean() if self.old_beta else output.loss
        return LossOutput(loss, output.metrics | {"old_kl": kl.detach().mean()})


def check_delta(delta: float | None, clip_range: float) -> None:
    """Raise ValueError if dual clip's bound of the ratio lies within the clip range."""
    if delta is not None and not delta > math.exp(clip_range):
        raise ValueError(
            f"delta is {delta}, a bound of the ratio, which the clip range of {clip_range:g} holds at "
            f"{math.exp(clip_range):.4g} already; use one above that"
        )


def nats_per_element(num_elements: int, reduction: str) -> float:
    """Return what one nat per latent element is in the units of `reduction`: 1 of "mean", sqrt(D), D of "sum"."""
    return float(num_elements * REDUCTIONS[reduction](num_elements))
