"""Write a report: numbers, pictures, styles and script in one file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import write_whole
from trl_tafs.output.speech import warn
from trl_tafs.report.charts import charts
from trl_tafs.report.facts import headlines, settings, status, times, wrong
from trl_tafs.report.pictures import strip
from trl_tafs.report.run import Run, read_run

ASSETS = Path(__file__).with_name("assets")
NAME = "report.html"


def report_of_run(folder: str | os.PathLike) -> Path | None:
    """Write `report.html` into a run's folder; None and a warning where that can't be done, whatever the reason."""
    try:
        return write_report([folder], Path(folder) / NAME)
    except Exception as error:  # of a disk, a damaged picture, a template: no report is worth a run
        warn(f"the report of {folder} can't be written ({first_line(error)}); `trl-tafs report {folder}` tries again")
        return None


def write_report(folders: Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        folders: of the runs.
        path: the HTML file.

    Raises:
        ValueError: a folder is no run's.
        OSError: the file can't be written.
    """
    return write_whole(path, render(_told_apart([read_run(folder) for folder in folders])))


def render(runs: Sequence[Run]) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = charts(runs)
    drawn = [strip(run) for run in runs]
    data = {"charts": [chart.data() for chart in made], "strips": [item for item in drawn if item["epochs"]]}
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    told = [
        {"run": run, "status": status(run), "headlines": headlines(run), "times": times(run), "wrong": wrong(run)}
        for run in runs
    ]
    page: str = environment.get_template("report.html.jinja").render(
        runs=told,
        charts=made,
        strips=data["strips"],
        settings=settings(runs),
        data=_json(data),
        assets={path.name: path.read_text(encoding="utf-8") for path in ASSETS.iterdir() if path.is_file()},
    )
    return page


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element: no text in it ends the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _told_apart(runs: list[Run]) -> list[Run]:
    """Return runs whose names differ: those of one name are called by their folders."""
    from dataclasses import replace

    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]
