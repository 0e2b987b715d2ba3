"""From rewards to advantages: group normalisation, the order of several rewards, DDPO's running statistics.

Rewards arrive as (B, Q, K, R), float64, with NaN where there is no score: differences of large rewards and squares of
huge ones are right in it. Advantages leave as (B, S, M), float32, finite: what has no score, or a group without
variance, gets 0.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trl_tafs.method.credit import Credit, Normalize
from trl_tafs.method.types import RewardTable

EPS = 1e-4  # Eq. 9's guard, as in TRL


def group_sums(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of what isn't NaN in each row's group: two (B, ...), each row holding its group's."""
    _, index = torch.unique(group_ids, return_inverse=True)
    valid = ~values.isnan()
    zeros = values.new_zeros(int(index.max()) + 1, *values.shape[1:])
    total = zeros.index_add(0, index, values.nan_to_num(0.0))
    count = zeros.index_add(0, index, valid.to(values.dtype))
    return total[index], count[index]


def group_mean_std(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each row's group, (B, ...) each; NaN rows don't count.

    A group with one score has no deviation: 0. Groups may differ in size. Sums are taken of differences from the
    group's least value, so that a common offset costs no precision.
    """
    low = group_least(values, group_ids)
    total, count = group_sums(values - low, group_ids)
    above = total / count.clamp(min=1)
    squares, _ = group_sums((values - low - above).square(), group_ids)
    std, mean = (squares / (count - 1).clamp(min=1)).sqrt(), low + above
    rounding = (8 * torch.finfo(values.dtype).eps * mean.abs()).clamp(min=1e-12)  # of values that should be equal
    return mean, torch.where(squares <= rounding.square() * count, torch.zeros_like(std), std)


def group_least(values: Tensor, group_ids: Tensor) -> Tensor:
    """Least value that isn't NaN of each row's group, (B, ...), each row holding its group's; 0 where there is none."""
    _, index = torch.unique(group_ids, return_inverse=True)
    most = values.new_full((int(index.max()) + 1, *values.shape[1:]), float("inf"))
    places = rows_like(index, values).expand_as(values)
    low = most.scatter_reduce(0, places, values.nan_to_num(float("inf")), "amin")[index]
    return low.masked_fill(low.isinf(), 0.0)


def normalize_groups(values: Tensor, group_ids: Tensor, scale: str = "group", centred: Tensor | None = None) -> Tensor:
    """Eq. 9: `(R - mean) / (std + 1e-4)` over the samples of one prompt, each column by itself.

    Args:
        values: (B, ...), NaN where there is no score.
        group_ids: (B,) int64.
        scale: "group", the paper's; "batch", the deviation of all groups together; "none", the mean alone (as
            TRL's `scale_rewards`).
        centred: (B,) bool, rows that are a group by themselves and have had a baseline of another origin taken out;
            they are divided by the mean deviation of the other groups, or by the batch's without them.

    Returns:
        (B, ...), NaN where `values` is, exactly 0 in a group without variance.
    """
    mean, std = group_mean_std(values, group_ids)
    residual = torch.where(std > 0, values - mean, torch.where(values.isnan(), values, torch.zeros_like(values)))
    if centred is not None and centred.any():
        rows = rows_like(centred, values)
        residual = torch.where(rows, values, residual)
        others = std.masked_fill((std == 0) | rows, float("nan")).nanmean(dim=0, keepdim=True)
        std = torch.where(rows, others.nan_to_num(1.0), std)
    if scale == "none":
        return residual
    if scale == "batch":
        whole = values if centred is None else values.masked_fill(rows_like(centred, values), float("nan"))
        std = group_mean_std(whole, torch.zeros_like(group_ids))[1]
        std = std if bool((~whole.isnan()).any()) else torch.ones_like(std)
    return residual / (std + EPS)


def rows_like(chosen: Tensor, values: Tensor) -> Tensor:
    """Reshape a per-image mask (B,) so that it broadcasts against values (B, ...)."""
    return chosen.reshape(-1, *[1] * (values.ndim - 1))


def normalize_states(values: Tensor, group_ids: Tensor, scale: str = "group") -> Tensor:
    """As `normalize_groups`, with the state's own value as the baseline: values (B, Q, K), K > 1.

    A state's actions are compared with the mean of their siblings; the deviation is that of these residuals over
    the whole group, so that states where exploration changes nothing weigh nothing.
    """
    low = values.nan_to_num(nan=float("inf")).amin(dim=2, keepdim=True)
    values = values - low  # so that equal values have residuals of exactly 0
    residual = values - values.nanmean(dim=2, keepdim=True)
    batch, steps = residual.shape[:2]
    flat = residual.transpose(1, 2).reshape(-1, steps)  # (B * K, Q)
    ids = group_ids.repeat_interleave(values.shape[2])
    ids = torch.zeros_like(ids) if scale == "batch" else ids
    std = torch.ones_like(flat) if scale == "none" else group_mean_std(flat, ids)[1] + EPS
    return (flat / std).reshape(batch, -1, steps).transpose(1, 2)


class RewardNormalizer(Protocol):
    """Statistics that take the place of the group's."""

    def update(self, prompts: Sequence[str], values: Tensor) -> Tensor:
        """Return the rewards (B, Q, K) of B images' prompts normalised, same shape, NaN where they are."""


class PerPromptStatTracker:
    """DDPO's running statistics: the last `buffer_size` rewards of a prompt, over epochs, by scored step.

    An epoch that brings more of one prompt counts with all of them.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.stats: dict[str, deque[list[float]]] = {}

    def update(self, prompts: Sequence[str], values: Tensor) -> Tensor:
        """Take in the rewards (B, Q, K) of one epoch and return them normalised, same shape.

        A prompt seen fewer than `min_count` times is normalised by the whole batch, as in DDPO.
        """
        rows = values.flatten(1)
        by_prompt: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_prompt[prompt].append(i)
        batch_mean, batch_std = group_mean_std(rows, torch.zeros(len(rows), dtype=torch.int64))
        out = torch.empty_like(rows)
        for prompt, index in by_prompt.items():
            buffer = deque(self.stats.get(prompt, ()), maxlen=max(self.buffer_size, len(index)))
            buffer.extend(rows[index].tolist())
            self.stats[prompt] = buffer
            mean, std = batch_mean[0], batch_std[0]
            if len(buffer) >= self.min_count:
                history = torch.tensor(list(buffer), dtype=rows.dtype)
                mean, std = (m[0] for m in group_mean_std(history, torch.zeros(len(history), dtype=torch.int64)))
            centred = torch.where((std > 0) | rows[index].isnan(), rows[index] - mean, 0.0)
            out[index] = centred / (std + EPS)
        return out.reshape(values.shape)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {prompt: list(buffer) for prompt, buffer in self.stats.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.stats = {prompt: deque(rows) for prompt, rows in state.items()}


def combine_rewards(table: RewardTable, group_ids: Tensor) -> Tensor:
    """Weighted sum of the rewards, (B, Q, K); NaN where an image lacks a score that its group has.

    A reward without any score in a group (one that doesn't apply to the prompt) is left out of that group's sum.
    """
    has = (~table.values.isnan()).to(table.values.dtype)
    applies = group_sums(has, group_ids)[0].sum(dim=(1, 2), keepdim=True) > 0  # (B, 1, 1, R), the prompt's rewards
    applies &= table.weights != 0
    missing = (applies & table.values.isnan()).any(-1) | ~applies.any(-1)
    total = (table.values.nan_to_num(0.0) * table.weights).sum(-1)
    return total.masked_fill(missing, float("nan"))


def normalize_then_sum(
    table: RewardTable, missing: Tensor, group_ids: Tensor, normalize: Normalize, by_batch: bool = True
) -> Tensor:
    """Normalise each reward by itself, then their weighted sum by the batch (GDPO; TRL's `normalize_then_sum`).

    Args:
        table: the rewards, (B, Q, K, R).
        missing: (B, Q, K) bool, where `combine_rewards` has no score.
        group_ids: (B,) int64.
        normalize: Eq. 9, for one reward of the name that is given with it.
        by_batch: False leaves the sum as it is (MixGRPO's `advantage_aggr`): its deviation is up to the sum of weights.

    Returns:
        (B, Q, K), already normalised; NaN where `missing` is true.
    """
    parts = [normalize(table.values[..., r], n).nan_to_num(0.0) * table.weights[r] for r, n in enumerate(table.names)]
    idle = (torch.stack(parts) == 0).all(0) & ~missing
    total = torch.stack(parts).sum(0).masked_fill(missing, float("nan"))
    if not by_batch:
        return total
    batch = torch.zeros_like(group_ids)
    return normalize_groups(total, batch).masked_fill(idle, 0.0)


@dataclass(frozen=True)
class AdvantageTable:
    """What the rewards of an epoch come to, on the CPU."""

    advantages: Tensor  # (B, S, M) float32, finite, within +-clip
    combined: Tensor  # (B, Q, K) float64, the weighted sum of the rewards; NaN where there is no score
    group_std: Tensor  # (B, Q, K) float64, its deviation within the image's group


@dataclass(frozen=True)
class Advantages:
    """Everything between the rewards and the loss: combine, normalise, credit, clip.

    `baseline(prompts) -> (B, Q)`, where it is given, is the expected reward of each prompt at each scored step, NaN
    where it isn't known: the baseline of a prompt that has a single image.
    """

    credit: Credit
    scale: str = "group"
    aggregation: str = "sum_then_normalize"
    own_baseline: bool = False  # the state's own value is the baseline (clean kernel)
    drop_mean: bool = False  # the last of the K images is the mean, a baseline and no action
    clip: float = 5.0
    tracker: RewardNormalizer | None = None
    baseline: Callable[[Sequence[str]], Tensor] | None = None

    def __call__(
        self,
        table: RewardTable,
        group_ids: Tensor,
        prompts: Sequence[str],
        num_trained: int,
        levels: Tensor | None = None,
    ) -> AdvantageTable:
        """Turn the rewards (B, Q, K, R) of whole groups into advantages.

        Args:
            table: the rewards.
            group_ids: (B,) int64.
            prompts: B.
            num_trained: S.
            levels: (Q,) of the scored steps, for credit rules that ask for them.
        """
        combined = combine_rewards(table, group_ids)
        alone = group_sums(torch.ones(len(group_ids)), group_ids)[1] == 1 if self.baseline is not None else None

        def normalize(values: Tensor, name: str = "") -> Tensor:
            if self.own_baseline:
                return normalize_states(values, group_ids, self.scale)
            if self.tracker is not None:
                return self.tracker.update([f"{name}:{p}" if name else p for p in prompts], values)
            return normalize_groups(values, group_ids, self.scale, alone)

        if self.aggregation != "sum_then_normalize":
            by_batch = self.aggregation == "normalize_then_sum"
            values = normalize_then_sum(table, combined.isnan(), group_ids, normalize, by_batch)
            inner: Callable[[Tensor], Tensor] = lambda done: done  # noqa: E731
        else:
            values, inner = combined, normalize
            if alone is not None and self.baseline is not None:
                values = torch.where(alone[:, None, None], values - self.baseline(prompts)[..., None], values)
        advantages = self.credit(values, num_trained, inner, levels)
        advantages = advantages[..., :-1] if self.drop_mean else advantages
        group_std = group_mean_std(combined, group_ids)[1]
        return AdvantageTable(advantages.clamp(-self.clip, self.clip).float(), combined, group_std)
