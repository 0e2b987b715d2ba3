"""What a run's folder holds, read as far as it is there: numbers by epoch, settings, pictures."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Curve = dict[int, float]  # value by epoch
_PICTURES = re.compile(r"epoch_(\d+)")
NOT_CURVES = ("step", "time", "epoch", "inner_epoch")


@dataclass(frozen=True)
class Run:
    """One run."""

    folder: Path
    name: str
    curves: dict[str, Curve]  # by the log's key
    settings: dict[str, Any]  # as they were given, or resolved; {} where config.json can't be read
    pictures: dict[int, list[Path]] = field(default_factory=dict)  # of the fixed prompts, by epoch
    prompts: tuple[str, ...] = ()  # of the pictures
    base: str = ""  # the base model's name
    seconds: float = 0.0  # from the first line of the log to the last one, without pauses
    finished: bool = False  # its adapter is written

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return max(self.curves.get("reward", {-1: 0.0})) + 1

    def first_and_last(self, name: str) -> tuple[float, float] | None:
        """Return the first and the last value of a curve; None where it has none."""
        curve = self.curves.get(name)
        return None if not curve else (curve[min(curve)], curve[max(curve)])

    def names(self, prefix: str) -> list[str]:
        """Return the curves whose key begins so."""
        return [name for name in self.curves if name.startswith(prefix)]


def read_run(folder: str | Path) -> Run:
    """Read a run's folder; what is torn or missing is left out.

    Raises:
        ValueError: it is no run's folder.
    """
    folder = Path(folder)
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"{folder} is no run's folder: it has no metrics.jsonl; give the folder that training wrote")
    curves, seconds = read_metrics(log)
    drawn = _read_json(folder / "pictures" / "prompts.json")
    prompts = drawn.get("prompts")
    settings = read_config(folder / "config.json")
    return Run(
        folder=folder,
        name=str(settings.get("run_name") or folder.resolve().name),
        curves=curves,
        settings=settings,
        pictures=_pictures(folder / "pictures"),
        prompts=tuple(map(str, prompts)) if isinstance(prompts, list) else (),
        base=str(drawn.get("base") or ""),
        seconds=seconds,
        finished=(folder / "adapter").is_dir(),
    )


def read_metrics(path: Path) -> tuple[dict[str, Curve], float]:
    """Return the curves of a log and the seconds that it spans.

    Several values of an epoch, those of its optimizer steps, become their mean. A line that is torn is left out, and
    so is a pause: a stretch without a line that is 20 times as long as the mean one.
    """
    sums: dict[str, dict[int, list[float]]] = {}
    times = []
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            epoch = int(values["epoch"])
        except (ValueError, TypeError, KeyError):
            continue
        if _is_number(values.get("time")):
            times.append(float(values["time"]))
        for name, value in values.items():
            if name not in NOT_CURVES and _is_number(value):
                sums.setdefault(name, {}).setdefault(epoch, []).append(float(value))
    curves = {n: {e: sum(v) / len(v) for e, v in sorted(points.items())} for n, points in sums.items()}
    steps = sorted(max(0.0, b - a) for a, b in zip(times, times[1:], strict=False))
    usual = sum(steps[: max(1, len(steps) * 9 // 10)]) / max(1, len(steps) * 9 // 10)
    return curves, sum(step for step in steps if step <= max(20 * usual, 60.0))


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings that a run wrote, with lists and None as they were given; {} where they can't be read."""
    from trl_tafs.config import read_settings

    try:
        with warnings.catch_warnings(action="ignore"):
            return read_settings(path)
    except ValueError:  # of a run of another version: as they stand
        return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(values) if isinstance(values, Mapping) else {}


def _pictures(folder: Path) -> dict[int, list[Path]]:
    found = {}
    for path in sorted(folder.glob("epoch_*")):
        match = _PICTURES.fullmatch(path.name)
        files = sorted(path.glob("*.png"), key=lambda file: (len(file.stem), file.stem))
        if match and files:
            found[int(match[1])] = files
    return dict(sorted(found.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
