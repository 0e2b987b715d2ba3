"""How far a run is: its counters, its curve, its evaluations, its best one."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """Counters and curves of a run; part of every checkpoint."""

    epoch: int = 0  # epochs done
    global_step: int = 0  # optimizer steps done
    skipped_steps: int = 0  # optimizer steps left out in a row, up to now
    idle_epochs: int = 0  # epochs without any advantage in a row, up to now
    best_metric: float | None = None
    evaluations_without_gain: int = 0
    reward_curve: list[tuple[int, float]] = field(default_factory=list)  # (epoch, mean reward)
    evaluations: list[dict[str, float]] = field(default_factory=list)  # epoch and metrics

    def add_evaluation(self, epoch: int, results: dict[str, float], metric: str | None, greater: bool) -> bool:
        """Keep an evaluation, and return whether it is the best one so far by `metric`.

        Args:
            epoch: epochs done when it was made.
            results: its metrics.
            metric: the name of the one that decides; None: no evaluation is the best one.
            greater: whether more of it is better.

        Raises:
            ValueError: there is no such metric among the results.
        """
        self.evaluations.append({"epoch": epoch} | results)
        if metric is None:
            return False
        if metric not in results:
            raise ValueError(f"metric_for_best_model is {metric!r}; evaluated are {', '.join(results)}")
        value = results[metric]
        if math.isnan(value):
            warnings.warn(f"{metric} is NaN at epoch {epoch}, so no score; the best so far stays", stacklevel=3)
            return False
        sign = 1.0 if greater else -1.0
        if self.best_metric is None or math.isnan(self.best_metric) or sign * value > sign * self.best_metric:
            self.best_metric, self.evaluations_without_gain = value, 0
            return True
        self.evaluations_without_gain += 1
        return False

    def evaluated(self, epoch: int) -> bool:
        """Return whether the evaluation after `epoch` epochs is done."""
        return any(row["epoch"] == epoch for row in self.evaluations)

    def out_of_patience(self, patience: int | None) -> bool:
        """Return whether `patience` evaluations have passed without a better one."""
        return patience is not None and self.evaluations_without_gain >= patience

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: a value is missing, unknown, or of another type.
        """
        names = [f.name for f in fields(self)]
        if wrong := sorted(state.keys() ^ set(names)):
            raise ValueError(f"progress {'lacks' if wrong[0] in names else 'has an unknown'} {wrong[0]!r}")
        curve = [(epoch, reward) for epoch, reward in state["reward_curve"]]
        sound = {f.name: _is_count(state[f.name]) for f in fields(self) if f.type == "int"} | {
            "best_metric": state["best_metric"] is None or _is_number(state["best_metric"]),
            "reward_curve": all(_is_count(epoch) and _is_number(reward) for epoch, reward in curve),
            "evaluations": all(
                isinstance(row, dict) and "epoch" in row and all(map(_is_number, row.values()))
                for row in state["evaluations"]
            ),
        }
        if not all(sound.values()):
            name = next(name for name, right in sound.items() if not right)
            raise ValueError(f"progress has {name}={str(state[name])[:80]!r}")
        for name in names:
            setattr(self, name, state[name])
        self.reward_curve = [(epoch, float(reward)) for epoch, reward in curve]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
