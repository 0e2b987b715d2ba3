"""Which curves a report shows, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trl_tafs.report.run import Curve, Run

DIGITS = 6  # of a number in the report


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    colour: int  # number of the palette
    curve: Curve
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart: a few lines over epochs."""

    title: str
    note: str  # what it says, and what to look for
    series: tuple[Series, ...]

    def data(self) -> dict[str, Any]:
        """Return it as the page's script takes it: epochs, and a list of values with null for each line."""
        epochs = sorted({epoch for series in self.series for epoch in series.curve})
        lines = [
            {"label": s.label, "colour": s.colour, "dashed": s.dashed, "points": len(s.curve) <= 40}
            for s in self.series
        ]
        values = [[short(series.curve.get(epoch)) for epoch in epochs] for series in self.series]
        return {"title": self.title, "series": lines, "data": [epochs, *values]}


def short(value: float | None) -> float | None:
    """Return a number with few digits; None stays."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of one run or of several, those without a point left out."""
    found = [
        _chart(runs, "Reward", "mean of the final images, over the epoch; it should rise", {"": "reward"}),
        *_by_reward(runs),
        _chart(
            runs,
            "Reward by step",
            "clean estimates after each scored step; late steps should stay above early ones",
            _named(runs, "reward/step_", "step "),
        ),
        *_held_out(runs),
        _chart(
            runs,
            "Distance to the base (KL)",
            "mean over latent elements; a steady rise without reward is drift",
            {"": "kl"},
        ),
        _chart(
            runs,
            "Clipped ratios, by the advantage's sign",
            "share of the rows; above .3 clipping throttles training",
            {"positive": "clipfrac_positive", "negative": "clipfrac_negative"},
        ),
        _chart(
            runs,
            "Deviation within groups",
            "of one prompt's images; 0: nothing to learn from",
            {"deviation": "reward/group_std"},
        ),
        _chart(
            runs,
            "Groups without deviation, images without a verdict",
            "shares; near 1: prompts too easy or too hard, or a reward that fails",
            {
                "no deviation": "frac_reward_zero_std",
                "no advantage": "frac_zero_advantage",
                "no verdict": "frac_no_verdict",
            },
        ),
        *_statistics(runs),
        _chart(runs, "Loss", "of the optimizer steps, mean of an epoch", {"": "loss"}),
        _chart(runs, "Gradient's norm", "before clipping", {"": "grad_norm"}),
        _chart(runs, "Learning rate", "", {"": "learning_rate"}),
        _chart(runs, "Images a second", "by rollout, decode, reward and update", {"": "images_per_second"}),
    ]
    return [chart for chart in found if any(series.curve for series in chart.series)]


def _chart(runs: Sequence[Run], title: str, note: str, names: dict[str, str]) -> Chart:
    """Return a chart of some keys of every run; one line's label is the run's, the key's, or both."""
    series, colour = [], 0
    for i, run in enumerate(runs):
        known = {label: name for label, name in names.items() if run.curves.get(name)}
        for k, (label, name) in enumerate(known.items()):
            colour = i if len(runs) > 1 and len(names) == 1 else i * len(names) + k
            words = [run.name] if len(runs) > 1 or not label else []
            series.append(Series(", ".join([*words, *([label] if label else [])]), colour, run.curves[name]))
    return Chart(title, note, tuple(series))


def _named(runs: Sequence[Run], prefix: str, word: str, keep: Callable[[str], bool] = bool) -> dict[str, str]:
    """Return label and key of the curves whose key begins so."""
    names = dict.fromkeys(name for run in runs for name in run.names(prefix) if keep(name))
    return {f"{word}{name.removeprefix(prefix)}": name for name in names}


def _by_reward(runs: Sequence[Run]) -> Iterator[Chart]:
    names = dict.fromkeys(name for run in runs for name in run.names("rewards/") if name.endswith("/mean"))
    if len(names) > 1:
        for name in names:
            reward = name.removeprefix("rewards/").removesuffix("/mean")
            yield _chart(runs, f"Reward: {reward}", "unweighted mean; look for one that pays for another", {"": name})


def _held_out(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart a held-out reward, a line a way of drawing."""
    rewards = dict.fromkeys(name.split("/", 2)[2] for run in runs for name in run.names("eval/") if name.count("/") > 1)
    for reward in rewards:
        names = dict.fromkeys(n for run in runs for n in run.names("eval/") if n.split("/", 2)[2:] == [reward])
        labels = {name.split("/")[1].replace("_", " ") + " steps": name for name in names}
        yield _chart(runs, f"Held out: {reward}", "prompts that aren't trained on; this rather than the reward", labels)


def _statistics(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart an image statistic, by the first way of drawing, with the range that the base's images had."""
    for statistic in dict.fromkeys(n.split("/")[2] for run in runs for n in run.names("image/") if n.count("/") == 2):
        series: list[Series] = []
        for i, run in enumerate(runs):
            name = next((n for n in run.names("image/") if n.endswith(f"/{statistic}")), None)
            if name is None:
                continue
            curve = run.curves[name]
            series.append(Series(run.name, i, curve))
            for edge in ("low", "high"):
                value = next(iter(run.curves.get(f"{name}/{edge}", {}).values()), None)
                if value is not None and len(runs) == 1:
                    flat = dict.fromkeys((min(curve), max(curve)), value)
                    series.append(Series(f"before training, {edge}", 6, flat, dashed=True))
        title = f"Images: {statistic.replace('_', ' ')}"
        note = "mean of the held-out images; the dashed lines are the least and the most of any image before training"
        yield Chart(title, note, tuple(series))
