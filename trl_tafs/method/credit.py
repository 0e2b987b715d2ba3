"""Step-aware credit: which of the scored steps' rewards an action answers for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_tafs.method.papers import Paper
from trl_tafs.method.parts import Part, own_options
from trl_tafs.options import check_choice

Normalize = Callable[..., Tensor]  # (values, reward's name = "")


def trace_advantages(values: Tensor, levels: Tensor, trace: float = 0.0, discount: float = 0.0) -> Tensor:
    r"""Step-level advantages in continuous time.

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
class CreditRule(Part):
    """How the rewards of the scored steps become advantages of the actions; a rule with options has fields for them."""

    own_step_only: ClassVar[bool] = False  # an action answers for its own step's image, and for no other
    final_only: ClassVar[bool] = False  # the image that the sampler returns is scored, and no other
    description: ClassVar[str] = "each step is credited by a rule of its own"

    def scored_steps(self, used: range, num_steps: int) -> range:
        """Return the steps to decode and score, given those whose rewards are used, of `num_steps` sampled."""
        return used

    def values(self, rewards: Tensor, levels: Tensor | None) -> Tensor:
        """Return what is normalised, (B, n, K), from the rewards (B, Q, K) of the scored steps at `levels` (Q,).

        It must be linear in the rewards, so that taking out the group's mean after it or before it is the same.
        """
        return rewards

    def __call__(self, normalised: Tensor) -> Tensor:
        """Return the advantages of as many actions, (B, n, K), from the normalised values (B, n, K)."""
        return normalised


class StepCredit(CreditRule):
    """`A^n` (Eq. 10), the default."""

    own_step_only: ClassVar[bool] = True
    description: ClassVar[str] = "each step answers for its own image"


class SumCredit(CreditRule):
    """The sum over all used steps, for every action (Algorithm 1, line 18)."""

    description: ClassVar[str] = "each step answers for all of them"

    def __call__(self, normalised: Tensor) -> Tensor:
        """Return the sum, for every action."""
        return normalised.sum(1, keepdim=True).expand_as(normalised)


class RewardToGo(CreditRule):
    """The sum over the used steps that follow the action."""

    description: ClassVar[str] = "each step answers for those that follow it"

    def __call__(self, normalised: Tensor) -> Tensor:
        """Return the sums from each action on."""
        return normalised.flip(1).cumsum(1).flip(1)


class GainCredit(CreditRule):
    """The normalised increment `R^{n+1} - R^n`: what this action added."""

    description: ClassVar[str] = "each step answers for what it added"

    def scored_steps(self, used: range, num_steps: int) -> range:
        """Return one step more: the one before the first that is used."""
        return range(used.start - 1, used.stop)

    def values(self, rewards: Tensor, levels: Tensor | None) -> Tensor:
        """Return the increments."""
        return rewards[:, 1:] - rewards[:, :-1]


@dataclass(frozen=True)
class TraceCredit(GainCredit):
    """`trace_advantages`, normalised: between the increment alone and all that follows, by rates per unit of level."""

    trace: float = 0.0  # kappa
    discount: float = 0.0  # rho
    description: ClassVar[str] = "each step answers for what it added, and less for what was added later"
    reads: ClassVar[Mapping[str, str]] = {"trace": "credit_trace", "discount": "credit_discount"}

    def values(self, rewards: Tensor, levels: Tensor | None) -> Tensor:
        """Return `trace_advantages`; raise ValueError without levels."""
        if levels is None:
            raise ValueError("step credit 'trace' needs the levels of the scored steps")
        return trace_advantages(rewards, levels, self.trace, self.discount)


class TerminalCredit(CreditRule):
    """The final image's reward, for every action (Table 3, "w/o Step Adv.")."""

    final_only: ClassVar[bool] = True
    description: ClassVar[str] = "every step answers for the final image"

    def scored_steps(self, used: range, num_steps: int) -> range:
        """Return the last step."""
        return range(num_steps - 1, num_steps)

    def __call__(self, normalised: Tensor) -> Tensor:
        """Return the last value, which all actions take."""
        return normalised[:, -1:]


@dataclass(frozen=True)
class FunctionCredit(CreditRule):
    """A plain function of `CREDITS`, (B, n, K) to (B, n, K); its keyword arguments are its options."""

    function: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> str:  # type: ignore[override]
        """The function's name."""
        return f"each step is credited by `{getattr(self.function, '__name__', 'a function')}`"

    @property
    def paper(self) -> Paper | None:  # type: ignore[override]
        """The function's attribute of that name."""
        return getattr(self.function, "paper", None)

    def __call__(self, normalised: Tensor) -> Tensor:
        """Return what the function does."""
        return self.function(normalised, **self.options)


CREDITS: dict[str, type[CreditRule] | Callable[[Tensor], Tensor]] = {
    "step": StepCredit,
    "sum": SumCredit,
    "reward_to_go": RewardToGo,
    "gain": GainCredit,
    "trace": TraceCredit,
    "terminal": TerminalCredit,
}


def credit_rule(options: Any) -> CreditRule:
    """Return the rule that `options.CreditOptions` name; raise ValueError for a name or an option that isn't there."""
    check_choice(options, "step_credit", CREDITS)
    entry = CREDITS[options.step_credit]
    if isinstance(entry, type) and issubclass(entry, CreditRule):
        return entry._made(options, "credit_kwargs")
    parameters = inspect.signature(entry).parameters.items()
    names = {name for name, parameter in parameters if parameter.default is not inspect.Parameter.empty}
    own = own_options(entry, "credit_kwargs", options.credit_kwargs, names)
    return FunctionCredit(entry, own)  # type: ignore[arg-type]  # no class is left


@dataclass(frozen=True)
class Credit:
    """Step-aware credit: which of the scored steps' rewards an action at step n answers for.

    `A^n` is the group-normalised reward of the n-th trained action's own clean image (Eq. 9), S of them. With
    `num_advantage_steps` = k only the last k are used (Table 5) and earlier actions take the first one counted;
    at k = 1 `StepCredit`, `SumCredit` and `RewardToGo` all are `TerminalCredit` (Table 3, "w/o Step Adv.").
    """

    rule: CreditRule = StepCredit()
    num_advantage_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_advantage_steps is not None and self.num_advantage_steps < 1:
            raise ValueError(f"num_advantage_steps is {self.num_advantage_steps}; at least one step is needed")

    def scored_steps(self, own: range, num_steps: int | None = None) -> range:
        """Return the steps to decode and score, given those of the actions' own images, of `num_steps` sampled."""
        used = min(self.num_advantage_steps or len(own), len(own))
        return self.rule.scored_steps(range(own.stop - used, own.stop), own.stop if num_steps is None else num_steps)

    def __call__(self, values: Tensor, num_trained: int, normalize: Normalize, levels: Tensor | None = None) -> Tensor:
        """Rewards (B, Q, K) of `scored_steps` to advantages (B, S, K), S = `num_trained`; NaN becomes 0.

        `normalize` is Eq. 9; `levels` (Q,) are the scored steps', for "trace".
        """
        per_step = normalize(self.rule.values(values, levels)).nan_to_num(0.0)
        credited = self.rule(per_step)
        earlier = num_trained - credited.shape[1]
        return torch.cat([credited[:, :1].expand(-1, earlier, -1), credited], dim=1)
