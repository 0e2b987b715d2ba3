r"""From rewards to advantages: group normalisation and step-aware credit.

Rewards arrive as (B, Q, K, R) with NaN where there is no verdict. Advantages leave as (B, S, M), float32, finite:
what has no verdict, or a group without variance, gets 0.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.types import RewardTable

EPS = 1e-4  # Eq. 9's guard, as in TRL
Normalize = Callable[..., Tensor]  # (values, reward's name = "")


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

    A group with one verdict has no deviation: 0. Groups may differ in size.
    """
    total, count = group_sums(values, group_ids)
    mean = total / count.clamp(min=1)
    squares, _ = group_sums((values - mean).square(), group_ids)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    constant = squares <= (1e-6 * mean.abs().clamp(min=1e-6)).square() * count  # equal up to rounding
    return mean, torch.where(constant, torch.zeros_like(std), std)


def normalize_groups(values: Tensor, group_ids: Tensor, scale: str = "group", centred: Tensor | None = None) -> Tensor:
    """Eq. 9: `(R - mean) / (std + 1e-4)` over the samples of one prompt, each column by itself.

    Args:
        values: (B, ...), NaN where there is no verdict.
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
    """(B,) for what is (B, ...)."""
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
        """What a checkpoint needs."""
        return {prompt: list(buffer) for prompt, buffer in self.stats.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.stats = {prompt: deque(rows) for prompt, rows in state.items()}


def combine_rewards(table: RewardTable, group_ids: Tensor) -> Tensor:
    """Weighted sum of the rewards, (B, Q, K); NaN where an image lacks a verdict that its group has.

    A reward without any verdict in a group (one that doesn't apply to the prompt) is left out of that group's sum.
    """
    has = (~table.values.isnan()).to(table.values.dtype)
    applies = group_sums(has, group_ids)[0].sum(dim=(1, 2), keepdim=True) > 0  # (B, 1, 1, R), the prompt's rewards
    applies &= table.weights != 0
    missing = (applies & table.values.isnan()).any(-1) | ~applies.any(-1)
    total = (table.values.nan_to_num(0.0) * table.weights).sum(-1)
    return total.masked_fill(missing, float("nan"))


def normalize_then_sum(table: RewardTable, group_ids: Tensor, normalize: Normalize) -> Tensor:
    """GDPO's order (TRL's `normalize_then_sum`): each reward normalised by itself, the weighted sum by the batch.

    (B, Q, K), already normalised; NaN as in `combine_rewards`.
    """
    missing = combine_rewards(table, group_ids).isnan()
    parts = [normalize(table.values[..., r], n).nan_to_num(0.0) * table.weights[r] for r, n in enumerate(table.names)]
    idle = (torch.stack(parts) == 0).all(0) & ~missing
    total = torch.stack(parts).sum(0).masked_fill(missing, float("nan"))
    batch = torch.zeros_like(group_ids)
    return normalize_groups(total, batch).masked_fill(idle, 0.0)


def trace_advantages(values: Tensor, levels: Tensor, trace: float = 0.0, discount: float = 0.0) -> Tensor:
    r"""SuperFlow's step-level advantages as we read its abstract (arXiv 2512.17951), in continuous time.

    .. math:: A_n = \sum_{m \ge n} e^{-(\kappa + \rho)(s_n - s_m)} \delta_m, \qquad
        \delta_m = e^{-\rho (s_m - s_{m+1})} V_{m+1} - V_m.

    Generalised advantage estimation whose trace and discount are rates per unit of level, not factors per step: as the
    schedule is refined, `A` tends to a function of the level, `\int e^{-(\kappa+\rho)(s - u)} (dV - \rho V du)`. At
    `trace` = 0 it telescopes to `e^{-\rho (s_n - s_{end})} V_{end} - V_n`; for a large one it is the increment alone.

    Args:
        values: (B, n + 1, K) V at `levels`, the rewards of the clean estimates there.
        levels: (n + 1,) falling.
        trace: kappa, 1 / level.
        discount: rho, 1 / level.

    Returns:
        (B, n, K) for the actions that lead from each level but the last to the next.
    """
    gaps = (levels[:-1] - levels[1:]).tolist()
    advantage, steps = torch.zeros_like(values[:, 0]), []
    for n in range(len(gaps) - 1, -1, -1):
        kept = math.exp(-discount * gaps[n])
        delta = kept * values[:, n + 1] - values[:, n]
        advantage = delta + kept * math.exp(-trace * gaps[n]) * advantage
        steps.append(advantage)
    return torch.stack(steps[::-1], dim=1)


@dataclass(frozen=True)
class Credit:
    """Step-aware credit: which of the scored steps' rewards an action at step n answers for.

    `A^n` is the group-normalised reward of the n-th trained action's own clean image (Eq. 9), S of them. With
    `num_advantage_steps` = k only the last k are used (Table 5) and earlier actions take the first one counted;
    at k = 1 `step`, `sum` and `reward_to_go` all are `terminal` (Table 3, "w/o Step Adv.").

    - "step": `A^n` (Eq. 10), the default
    - "sum": the sum over all used steps, for every action (Algorithm 1, line 18)
    - "reward_to_go": the sum over the used steps that follow the action
    - "gain": the normalised increment `R^{n+1} - R^n`: what this action added
    - "trace": `trace_advantages`, normalised: between the increment alone and all that follows, by rates per unit of
      level
    - "terminal": the final image's, for every action
    """

    name: str = "step"
    num_advantage_steps: int | None = None
    trace: float = 0.0  # kappa of "trace"
    discount: float = 0.0  # rho of "trace"

    def __post_init__(self) -> None:
        if self.name not in CREDITS:
            raise ValueError(f"step credit {self.name!r} is unknown; use one of {', '.join(CREDITS)}")
        if self.num_advantage_steps is not None and self.num_advantage_steps < 1:
            raise ValueError(f"num_advantage_steps is {self.num_advantage_steps}; at least one step is needed")

    def scored_steps(self, own: range, num_steps: int | None = None) -> range:
        """The steps to decode and score, given those of the actions' own clean images, of `num_steps` sampled."""
        if self.name == "terminal":
            last = own.stop if num_steps is None else num_steps
            return range(last - 1, last)
        used = min(self.num_advantage_steps or len(own), len(own))
        return range(own.stop - used - (1 if self.name in ("gain", "trace") else 0), own.stop)

    def __call__(self, values: Tensor, num_trained: int, normalize: Normalize, levels: Tensor | None = None) -> Tensor:
        """Rewards (B, Q, K) of `scored_steps` to advantages (B, S, K), S = `num_trained`; NaN becomes 0.

        `normalize` is Eq. 9; `levels` (Q,) are the scored steps', for "trace". What is done to the rewards before it is
        linear, so that taking out the group's mean after it or before it is the same.
        """
        if self.name == "gain":
            values = values[:, 1:] - values[:, :-1]
        if self.name == "trace":
            if levels is None:
                raise ValueError("step credit 'trace' needs the levels of the scored steps")
            values = trace_advantages(values, levels, self.trace, self.discount)
        per_step = normalize(values).nan_to_num(0.0)
        credited = CREDITS[self.name](per_step)
        earlier = num_trained - credited.shape[1]
        return torch.cat([credited[:, :1].expand(-1, earlier, -1), credited], dim=1)


CREDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "step": lambda a: a,
    "sum": lambda a: a.sum(1, keepdim=True).expand_as(a),
    "reward_to_go": lambda a: a.flip(1).cumsum(1).flip(1),
    "gain": lambda a: a,
    "trace": lambda a: a,
    "terminal": lambda a: a[:, -1:],
}


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
    tracker: PerPromptStatTracker | None = None
    baseline: Callable[[Sequence[str]], Tensor] | None = None

    def __call__(
        self,
        table: RewardTable,
        group_ids: Tensor,
        prompts: Sequence[str],
        num_trained: int,
        levels: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, K, R) rewards of whole groups to (B, S, M) advantages, float32, finite, within +-clip."""
        alone = group_sums(torch.ones(len(group_ids)), group_ids)[1] == 1 if self.baseline is not None else None

        def normalize(values: Tensor, name: str = "") -> Tensor:
            if self.own_baseline:
                return normalize_states(values, group_ids, self.scale)
            if self.tracker is not None:
                return self.tracker.update([f"{name}:{p}" if name else p for p in prompts], values)
            return normalize_groups(values, group_ids, self.scale, alone)

        if self.aggregation == "normalize_then_sum":
            values, inner = normalize_then_sum(table, group_ids, normalize), lambda normalised: normalised
        else:
            values, inner = combine_rewards(table, group_ids), normalize
            if alone is not None:
                values = torch.where(alone[:, None, None], values - self.baseline(prompts)[..., None], values)
        advantages = self.credit(values, num_trained, inner, levels)
        advantages = advantages[..., :-1] if self.drop_mean else advantages
        return advantages.clamp(-self.clip, self.clip)
