"""95% intervals of a benchmark's figures: of the seeds' variance and of the judged images'."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

Seeds = Sequence[Sequence[float]]  # for each seed, the value of each judged image; the images are the same for all


class Interval(NamedTuple):
    """A mean and half the width of its 95% interval."""

    mean: float
    half: float


class Part(NamedTuple):
    """A part of a mean's variance, with its degrees of freedom."""

    variance: float
    freedom: int


def part(values: Sequence[float]) -> Part:
    """The variance of the mean of independent values; nothing can be said of one."""
    if len(values) < 2:
        return Part(0.0, 0)
    return Part(statistics.variance(values) / len(values), len(values) - 1)


def of_parts(mean: float, parts: Sequence[Part]) -> Interval:
    """Student's interval of a sum of variances, its degrees of freedom by Welch and Satterthwaite."""
    total = sum(each.variance for each in parts)
    if total <= 0:
        return Interval(mean, 0.0)
    freedom = total**2 / sum(each.variance**2 / each.freedom for each in parts if each.freedom)
    return Interval(mean, float(stats.t.ppf(0.975, freedom)) * total**0.5)


def by_seed(seeds: Seeds) -> list[float]:
    """Each seed's mean."""
    return [statistics.fmean(values) for values in seeds]


def by_image(seeds: Seeds) -> list[float]:
    """Each image's mean over seeds."""
    return [statistics.fmean(values) for values in zip(*seeds, strict=True)]


def interval(seeds: Seeds) -> Interval:
    """The mean over seeds and images."""
    return of_parts(statistics.fmean(by_seed(seeds)), [part(by_seed(seeds)), part(by_image(seeds))])


def difference(first: Seeds, second: Seeds) -> Interval:
    """The first's mean less the second's: image by image, for both were judged on the same; seeds are independent."""
    gains = [a - b for a, b in zip(by_image(first), by_image(second), strict=True)]
    return of_parts(statistics.fmean(gains), [part(by_seed(first)), part(by_seed(second)), part(gains)])


def verdict(gain: Interval) -> str:
    """Whether an interval lies above 0, below it, or holds it."""
    if abs(gain.mean) <= gain.half:
        return "can't be told"
    return "helps" if gain.mean > 0 else "harms"
