"""Step-aware credit: which of the scored steps' rewards an action answers for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Normalize = Callable[..., Tensor]  # (values, reward's name = "")


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
