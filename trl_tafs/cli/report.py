"""`trl-tafs report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from trl_tafs.cli.command import CommandOptions, parse
from trl_tafs.output.writable import check_writable


@dataclass
class ReportOptions(CommandOptions):
    """Whose report, and where it is written."""

    title: ClassVar[str] = "Report"
    positional: ClassVar[dict[str, str | None]] = {"runs": "+"}

    runs: list[str] = field(default_factory=list, metadata={"help": "Folders of runs, finished or not."})
    output: str | None = field(
        default=None, metadata={"help": "The HTML file; None: report.html in the run's folder or, of several, here."}
    )


def report(argv: Sequence[str]) -> Callable[[], None]:
    """Write one HTML page of a run, or of several side by side: curves, pictures, time, settings."""
    from trl_tafs.report.run import read_run
    from trl_tafs.report.write import NAME, write_report

    usage = "%(prog)s RUN ... [options]"
    (options,) = parse([ReportOptions], argv, prog="trl-tafs report", description=report.__doc__, usage=usage)
    for folder in options.runs:
        read_run(folder)
    path = Path(options.output or (Path(options.runs[0]) / NAME if len(options.runs) == 1 else NAME))
    if path.is_dir():
        raise ValueError(f"--output can't be written: {path} is a folder; name a file, such as {path / NAME}")
    check_writable(path.parent, "the folder of --output")
    return lambda: print(f"report: {write_report(options.runs, path)}")
