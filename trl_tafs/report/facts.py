"""What a report says in words and tables: headline figures, time, settings, what looks wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from trl_tafs.report.run import Run
from trl_tafs.training.logs import PHASES
from trl_tafs.training.symptoms import Symptoms

OTHERS = ("evaluate", "pictures", "save")  # stretches beside an epoch's phases
WHERE = ("exp_name", "run_name", "logdir", "project_kwargs", "resume_from", "disable_tqdm")  # no matter of the method


def status(run: Run) -> str:
    """Return how far a run is, in words."""
    asked = run.settings.get("num_epochs")
    done = f"{run.epochs} epoch{'' if run.epochs == 1 else 's'}"
    if not isinstance(asked, int) or run.epochs >= asked:
        return f"finished, {done}" if run.finished else done
    return f"{'stopped early' if run.finished else 'not finished'}, {done} of {asked}"


def headlines(run: Run) -> list[dict[str, str]]:
    """Return a run's few figures: what they are, the value, and what it was at first."""
    found = []
    names = {"reward": "reward"}
    chosen = run.settings.get("metric_for_best_model")
    held_out = chosen if chosen in run.curves else next(iter(run.names("eval/")), None)
    if held_out:
        names[held_out] = "held out, " + held_out.removeprefix("eval/").replace("_", " ").replace("/", " steps, ", 1)
    names["kl"] = "distance to the base"
    for name, label in names.items():
        if (ends := run.first_and_last(name)) is not None:
            found.append({"label": label, "value": f"{ends[1]:.3g}", "first": f"first {ends[0]:.3g}"})
    pace = run.first_and_last("images_per_second")
    if run.seconds:
        speed = f"{pace[1]:.3g} images a second" if pace else ""
        found.append({"label": "time", "value": duration(run.seconds), "first": speed})
    return found


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def times(run: Run) -> dict[str, Any] | None:
    """Return the mean seconds of an epoch's phases, the floor, and the run's other stretches; None where unknown."""
    phases = [(name, run.curves.get(f"time/{name}", {})) for name in PHASES]
    mean = {name: sum(curve.values()) / len(curve) for name, curve in phases if curve}
    if not mean or not (total := sum(mean.values())):
        return None
    floor = run.curves.get("time/floor", {})
    least = sum(floor.values()) / len(floor) if floor else None
    widest = max(total, least or 0.0)
    bars = [{"name": name, "seconds": f"{value:.3g}", "share": 100 * value / widest} for name, value in mean.items()]
    others = {name: sum(run.curves.get(f"time/{name}", {}).values()) for name in OTHERS}
    return {
        "run": run.name,
        "bars": bars,
        "total": f"{total:.3g}",
        "floor": None if least is None else f"{least:.3g}",
        "floor_share": None if least is None else 100 * least / widest,
        "over": None if not least else f"{total / least:.2f}",
        "others": ", ".join(f"{name} {duration(value)}" for name, value in others.items() if value),
    }


def settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the settings that differ from the defaults in any run, each with its value in all of them."""
    from trl_tafs.config import TAFSGRPOConfig

    defaults = {}
    for field in dataclasses.fields(TAFSGRPOConfig):
        made = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if made else field.default  # type: ignore[misc]
    rows = []
    for name, default in defaults.items():
        values = [run.settings.get(name, default) for run in runs]
        if name not in WHERE and any(_differ(value, default) for value in values):
            shown = [_shown(value) for value in values]
            rows.append({"name": name, "default": _shown(default), "values": shown, "differ": len(set(shown)) > 1})
    return rows


def _differ(value: Any, default: Any) -> bool:
    empty = (None, {}, [], "", "null", "{}")
    return value != default and not (value in empty and default in empty)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, (list, dict)) else str(value)


def wrong(run: Run) -> list[str]:
    """Return what looks wrong in a run's curves, as the run itself says it while it trains."""
    chosen = run.settings.get("metric_for_best_model")
    sign = -1 if run.settings.get("greater_is_better") is False else 1
    judged = {chosen: sign} if chosen else dict.fromkeys(run.names("eval/"), 1)
    symptoms = Symptoms(drawn=f"annealed_{run.settings.get('sample_num_steps', 4)}", direction=judged)
    return [line for _, line in sorted(_replayed(run, symptoms), key=lambda pair: pair[0])]


def _replayed(run: Run, symptoms: Symptoms) -> Iterator[tuple[int, str]]:
    curve, distances = list(run.curves.get("reward", {}).items()), run.curves.get("kl", {})
    for i, (epoch, _) in enumerate(curve):
        for said in symptoms.epoch(curve[: i + 1], distances.get(epoch)):
            yield epoch, f"epoch {epoch}: {said}"
    names = run.names("eval/") + run.names("image/")
    rows: list[dict[str, float]] = []
    for epoch in sorted({epoch for name in names for epoch in run.curves[name]}):
        rows.append({name: run.curves[name][epoch] for name in names if epoch in run.curves[name]})
        rewards = [reward for e, reward in curve if e < epoch]
        for said in symptoms.evaluation(rows, rewards):
            yield epoch, f"after epoch {epoch}: {said}"
