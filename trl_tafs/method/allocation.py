"""How many images each prompt of an epoch gets.

Fixed groups, or more images where a prompt's rewards vary, since only there a group-relative advantage says anything.
The latter are ours; SuperFlow's are in `superflow`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trl_tafs.method.advantages import group_mean_std
from trl_tafs.method.noise import noise_seed

PromptWeights = Callable[[Sequence[str]], Tensor]  # of P prompts, (P,), all above 0


def neyman_allocation(deviations: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """Neyman's allocation in whole images: `n_p` proportional to `deviations[p]`, within [low, high], `total` in all.

    A fixed budget so spent estimates the mean over prompts with the least variance: the mean of each prompt's mean, so
    that images must weigh `1 / n_p` (`images_of_equal_prompts`). Where bounds bind, the others share what is left in
    proportion; where nothing varies, all get the same. Rounded by the largest remainders.

    Args:
        deviations: P standard deviations of a prompt's rewards, at least 0.
        total: images to give out.
        low: least images a prompt gets.
        high: most images a prompt gets.

    Raises:
        ValueError: `total` can't be reached within the bounds.
    """
    count = len(deviations)
    if not count * low <= total <= count * high:
        raise ValueError(
            f"{count} prompts of {low} to {high} images can't make {total}; use a minimum of at most {total // count} "
            f"and a maximum of at least {-(-total // count)}"
        )
    weights = torch.tensor(deviations, dtype=torch.float64)
    weights = weights.clamp(min=1e-9 * float(weights.max())) if weights.max() > 0 else torch.ones_like(weights)
    least, most = 0.0, high / float(weights.min())
    for _ in range(200):  # the scale at which the bounded shares add up to the total
        middle = (least + most) / 2
        if float((middle * weights).clamp(low, high).sum()) < total:
            least = middle
        else:
            most = middle
    shares = (most * weights).clamp(low, high)
    sizes = (shares + 1e-6).floor().clamp(low, high)
    remainders = torch.where(sizes < high, shares - sizes, -1.0)
    left = total - int(sizes.sum())
    sizes[remainders.argsort(descending=True, stable=True)[:left]] += 1
    return sizes.int().tolist()


def images_of_equal_prompts(group_ids: Tensor) -> Tensor:
    """Return weights of images with which a mean over them is the mean over prompts of each one's mean, (B,).

    They are `n / n_p`, n the mean size of a group, and 1 where all groups are of one size.

    Args:
        group_ids: (B,) int64, 0 to P - 1.
    """
    sizes = torch.bincount(group_ids).float()
    return (sizes[sizes > 0].mean() / sizes)[group_ids]


class PromptTracker:
    """Mean and variance of each prompt's rewards at Q scored steps, exponentially weighted over epochs.

    An image is evidence of weight 1, and of all evidence an epoch keeps the share `memory`, since the policy that it
    was seen under moves on. The variance is within an epoch, so that progress from epoch to epoch isn't counted as
    spread.

    Memory is bounded: at most `capacity` prompts, of which the one seen longest ago makes room for a new one. A million
    prompts of 3 steps take 68 MB, and their index about 100.
    """

    def __init__(self, num_values: int, memory: float = 0.9, capacity: int = 1_000_000) -> None:
        self.memory, self.capacity = memory, capacity
        self.rows: dict[int, int] = {}  # a prompt's key to its row; the one seen longest ago first
        self.mean = torch.zeros(0, num_values, dtype=torch.float64)
        self.variance = torch.zeros(0, num_values, dtype=torch.float64)
        self.weight = torch.zeros(0)  # evidence for the mean, images
        self.freedom = torch.zeros(0)  # evidence for the variance, degrees of freedom
        self.epoch = torch.zeros(0, dtype=torch.int64)  # when seen last

    def __len__(self) -> int:
        return len(self.rows)

    def update(self, prompts: Sequence[str], values: Tensor, epoch: int) -> None:
        """Take in an epoch's rewards (B, Q) of B images' prompts; rows with a NaN don't count."""
        by_prompt: dict[str, list[int]] = {}
        for i in (~values.isnan().any(1)).nonzero().flatten().tolist():
            by_prompt.setdefault(prompts[i], []).append(i)
        for prompt, index in by_prompt.items():
            row = self._row(noise_seed("prompt", prompt))
            self._merge(row, values[index].double(), epoch)

    def _merge(self, row: int, values: Tensor, epoch: int) -> None:
        count, mean = len(values), values.mean(0)
        kept = self.memory ** max(epoch - int(self.epoch[row]), 0)
        weight, freedom = kept * self.weight[row], kept * self.freedom[row]
        known = count == 1 and weight > 0  # a single image deviates from what was known of its prompt
        squares = (values - (self.mean[row] if known else mean)).square().sum(0)
        gained = 1.0 if known else count - 1.0
        if freedom + gained > 0:
            self.variance[row] = (freedom * self.variance[row] + squares) / (freedom + gained)
        self.mean[row] = (weight * self.mean[row] + count * mean) / (weight + count)
        self.weight[row], self.freedom[row], self.epoch[row] = weight + count, freedom + gained, epoch

    def _row(self, key: int) -> int:
        row = self.rows.pop(key, None)
        if row is None and len(self.rows) >= self.capacity:
            row = self.rows.pop(next(iter(self.rows)))
            self.weight[row] = self.freedom[row] = 0.0
        elif row is None:
            row = len(self.rows)
            if row == len(self.weight):
                self._grow(min(max(2 * row, 1024), self.capacity))
        self.rows[key] = row
        return row

    def _grow(self, size: int) -> None:
        for name in ("mean", "variance", "weight", "freedom", "epoch"):
            old = getattr(self, name)
            new = old.new_zeros(size, *old.shape[1:])
            new[: len(old)] = old
            setattr(self, name, new)

    def means(self, prompts: Sequence[str]) -> Tensor:
        """(B, Q) expected rewards, NaN for a prompt never seen."""
        rows = [self.rows.get(noise_seed("prompt", prompt)) for prompt in prompts]
        unknown = self.mean.new_full((self.mean.shape[1],), float("nan"))
        return torch.stack([unknown if row is None else self.mean[row] for row in rows])

    def deviations(self, prompts: Sequence[str], epoch: int) -> tuple[Tensor, Tensor]:
        """(P,) deviation at the last scored step, NaN for a prompt never seen, and (P,) the images that it rests on."""
        deviation, evidence = self.variance.new_full((len(prompts),), float("nan")), torch.zeros(len(prompts))
        for i, prompt in enumerate(prompts):
            row = self.rows.get(noise_seed("prompt", prompt))
            if row is not None and self.freedom[row] > 0:
                deviation[i] = self.variance[row, -1].clamp(min=0).sqrt()
                evidence[i] = self.weight[row] * self.memory ** max(epoch - int(self.epoch[row]), 0)
        return deviation, evidence

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        keys, rows = list(self.rows.keys()), list(self.rows.values())
        state = {name: getattr(self, name)[rows] for name in ("mean", "variance", "weight", "freedom", "epoch")}
        return state | {"keys": torch.tensor(keys, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name in ("mean", "variance", "weight", "freedom", "epoch"):
            setattr(self, name, state[name].to(getattr(self, name).dtype, copy=True))
        self.rows = {key: row for row, key in enumerate(state["keys"].tolist())}


def optimistic_deviations(deviation: Tensor, evidence: Tensor, optimism: float) -> Tensor:
    """`std + optimism mean(std) / sqrt(1 + evidence)`, (P,): what little is known of is thought to vary.

    The bonus decays with the images seen and comes back as they age, so that a prompt whose rewards had stopped varying
    is looked at again once the policy has changed. NaN (never seen) stays.
    """
    typical = deviation.nanmean().nan_to_num(0.0)
    return deviation + optimism * typical / torch.sqrt(1 + evidence)


@dataclass(frozen=True)
class GroupBounds:
    """How many images a prompt gets in an epoch."""

    mean: int  # G
    least: int
    most: int


class GroupSizes(Protocol):
    """What the trainer asks of an allocation. An epoch's images are drawn in one wave or two."""

    @property
    def weights(self) -> PromptWeights | None:
        """By which weights an epoch's prompts are drawn; None: in turn."""

    def first(self, prompts: Sequence[str], epoch: int) -> list[int]:
        """Images of each of P prompts in the first wave."""

    def rest(self, values: Tensor, group_ids: Tensor) -> list[int] | None:
        """Images of each prompt in a second wave, given the first one's final rewards (B,); None: there is none."""

    def update(self, prompts: Sequence[str], values: Tensor, epoch: int) -> None:
        """Learn from all of an epoch's rewards, (B, Q)."""


@dataclass(frozen=True)
class FixedGroups:
    """G images of every prompt, the paper's."""

    group_size: int
    weights: ClassVar[None] = None

    def first(self, prompts: Sequence[str], epoch: int) -> list[int]:
        """G each."""
        return [self.group_size] * len(prompts)

    def rest(self, values: Tensor, group_ids: Tensor) -> None:
        """No second wave."""

    def update(self, prompts: Sequence[str], values: Tensor, epoch: int) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class VarianceGroups:
    """Variance-aware groups: a fixed budget spent by what a tracker knows of each prompt.

    A prompt never seen gets the default G; the others share the rest by `neyman_allocation` of their optimistic
    deviations. Prompts whose rewards don't vary get the least.
    """

    tracker: PromptTracker
    group_size: int  # G, the default and the mean
    low: int
    high: int
    optimism: float = 0.5
    weights: ClassVar[None] = None

    def first(self, prompts: Sequence[str], epoch: int) -> list[int]:
        """`P * G` images in all."""
        deviation, evidence = self.tracker.deviations(prompts, epoch)
        seen = (~deviation.isnan()).nonzero().flatten().tolist()
        sizes = [self.group_size] * len(prompts)
        if seen:
            wanted = optimistic_deviations(deviation[seen], evidence[seen], self.optimism)
            shared = neyman_allocation(wanted.tolist(), self.group_size * len(seen), self.low, self.high)
            for i, size in zip(seen, shared, strict=True):
                sizes[i] = size
        return sizes

    def rest(self, values: Tensor, group_ids: Tensor) -> list[int] | None:
        """No second wave."""
        return None

    def update(self, prompts: Sequence[str], values: Tensor, epoch: int) -> None:
        """Track every prompt."""
        self.tracker.update(prompts, values, epoch)


@dataclass(frozen=True)
class StreamingGroups(VarianceGroups):
    """Streaming: `low` images of each prompt first, then the rest of the budget where these varied."""

    def first(self, prompts: Sequence[str], epoch: int) -> list[int]:
        """`low` each."""
        return [self.low] * len(prompts)

    def rest(self, values: Tensor, group_ids: Tensor) -> list[int] | None:
        """Return sizes that share what is left of `P * G`."""
        count = int(group_ids.max()) + 1
        deviation = values.new_zeros(count)
        deviation[group_ids] = group_mean_std(values, group_ids)[1]
        wanted = optimistic_deviations(deviation, torch.full((count,), float(self.low)), self.optimism)
        sizes = neyman_allocation(wanted.tolist(), self.group_size * count, self.low, self.high)
        return [size - self.low for size in sizes]
