"""What an epoch logs: averages of metrics, and seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class MeanMetrics:
    """Sums metric dicts on their device; `pop` gives their means and starts anew. No host copy before that.

    What is set in `last` is given as it is.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one dict of scalars, () each."""
        for name, value in metrics.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value.detach().clone()
        self.count += 1

    def pop(self) -> dict[str, Tensor]:
        """The means since the last `pop`."""
        means = {name: total / max(self.count, 1) for name, total in self.totals.items()} | self.last
        self.totals, self.last, self.count = {}, {}, 0
        return means


class Stopwatch:
    """Seconds spent in named stretches; a stretch within another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of stretches within the present one

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stretch; `with stopwatch("rollout"):`."""
        outer, self._inner, start = self._inner, 0.0, time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner
            self._inner = outer + elapsed

    def pop(self) -> dict[str, float]:
        """`time/<name>` of each stretch since the last `pop`."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
