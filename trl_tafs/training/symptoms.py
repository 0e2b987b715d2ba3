"""What looks wrong in a run's curves, in plain words: flat, drifting, rewarded for another thing than better images."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 10  # epochs that are compared with as many others
CLEAR = 2.0  # standard errors by which a rise counts
DRIFT = 1.5  # times the distance to the base that it was a window ago
WIDTH = 0.05  # of a statistic: its range in the base is at least so wide, relative to its middle
LEAST = 1e-3  # or so wide


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def rise(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return by how much the second mean is above the first, and the standard error of that; epochs are independent."""

    def error(values: Sequence[float]) -> float:
        middle = mean(values)
        return sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1) / len(values)

    return mean(after) - mean(before), math.sqrt(error(before) + error(after))


@dataclass
class Symptoms:
    """Looks at the curves after each epoch and evaluation; each symptom is told at the first time, the second, the
    fourth, ... that it is found in a row.

    Args:
        drawn: how training draws, such as annealed_4, whose image statistics are judged where they are there.
        direction: of each held-out metric that is judged, 1 where more is better and -1 where less is.
    """

    drawn: str = ""
    direction: Mapping[str, int] = field(default_factory=dict)
    distances: deque[float] = field(default_factory=lambda: deque(maxlen=2 * WINDOW))  # `kl` of the last epochs
    found: dict[str, int] = field(default_factory=dict)  # how often in a row, by symptom

    def epoch(self, curve: Sequence[tuple[int, float]], distance: float | None) -> Iterator[str]:
        """Yield what is wrong after an epoch.

        Args:
            curve: (epoch, mean reward) of all epochs so far.
            distance: to the base, `kl`; None where it isn't measured.
        """
        rewards = [reward for _, reward in curve]
        if distance is not None and math.isfinite(distance):
            self.distances.append(distance)
        if len(rewards) >= 2 * WINDOW and len(rewards) % WINDOW == 0:
            yield from self._told("flat", self._flat(rewards))
            yield from self._told("drift", self._drift(rewards))

    def evaluation(self, rows: Sequence[Mapping[str, float]], rewards: Sequence[float]) -> Iterator[str]:
        """Yield what is wrong after an evaluation.

        Args:
            rows: the evaluations so far, the last one last.
            rewards: the mean training reward of each epoch so far.
        """
        yield from self._told("image", self._changed(rows))
        for name in self.direction:
            yield from self._told(name, self._worse(name, rows, rewards))

    def _told(self, symptom: str, said: str | None) -> Iterator[str]:
        count = self.found[symptom] = self.found.get(symptom, 0) + 1 if said else 0
        if said and not count & (count - 1):
            yield said

    def _changed(self, rows: Sequence[Mapping[str, float]]) -> str | None:
        measured = [name for name in rows[0] if name.startswith("image/") and f"{name}/low" in rows[0]]
        prefix = f"image/{self.drawn}/"
        if not any(name.startswith(prefix) for name in measured) and measured:
            prefix = measured[0].rpartition("/")[0] + "/"
        found = [said for name in measured if name.startswith(prefix) and (said := _out_of_range(name, rows))]
        if not found:
            return None
        return (
            f"suspected reward hacking: the held-out images have a mean {', '.join(found)}, which no image had then. "
            "Look at the pictures before the reward: raise beta, add a reward that the change costs, or take an "
            "earlier checkpoint"
        )

    def _flat(self, rewards: Sequence[float]) -> str | None:
        first, last = rewards[:WINDOW], rewards[-WINDOW:]
        more, error = rise(first, last)
        if more > CLEAR * error:
            return None
        moved = "has fallen" if more < -CLEAR * error else "is flat"
        return (
            f"the reward {moved}: {mean(first):.4g} over the first {WINDOW} epochs, {mean(last):.4g} over the last "
            f"{WINDOW}, with a standard error of {error:.2g}. See whether images of one prompt differ in reward at all "
            "(reward/group_std); then try another train_learning_rate (docs/learning.md), or more images an epoch"
        )

    def _drift(self, rewards: Sequence[float]) -> str | None:
        if len(self.distances) < 2 * WINDOW or len(rewards) < 2 * WINDOW:
            return None
        known = list(self.distances)
        before, after = mean(known[:WINDOW]), mean(known[WINDOW:])
        more, error = rise(rewards[-2 * WINDOW : -WINDOW], rewards[-WINDOW:])
        if after <= DRIFT * before or more > CLEAR * error:
            return None
        return (
            f"the model drifts: its distance to the base (kl) went from {before:.3g} to {after:.3g} in {WINDOW} epochs "
            "while the reward didn't rise. Stop here and take an earlier checkpoint, or raise beta"
        )

    def _worse(self, name: str, rows: Sequence[Mapping[str, float]], rewards: Sequence[float]) -> str | None:
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        if len(values) < 3 or len(rewards) < 2 * WINDOW:
            return None
        more, error = rise(rewards[:WINDOW], rewards[-WINDOW:])
        sign = self.direction[name]
        if more <= CLEAR * error or not all(sign * value < sign * values[0] for value in values[-2:]):
            return None
        return (
            f"suspected reward hacking: the training reward rose by {more:.3g}, and {name} is worse than before "
            f"training ({values[0]:.4g}, now {values[-1]:.4g}). Look at the pictures; train on several rewards, or "
            "stop earlier (metric_for_best_model, early_stopping_patience)"
        )


def _out_of_range(name: str, rows: Sequence[Mapping[str, float]]) -> str | None:
    """Return a statistic in words whose mean lies where no image lay before training."""
    first, value = rows[0], rows[-1].get(name)
    low, high = first[f"{name}/low"], first[f"{name}/high"]
    room = max(0.0, max(WIDTH * abs(first[name]), LEAST) - (high - low)) / 2
    if value is None or not math.isfinite(value) or low - room <= value <= high + room:
        return None
    return f"{name.rpartition('/')[2].replace('_', ' ')} {value:.3g} ({low:.3g} to {high:.3g} before training)"
