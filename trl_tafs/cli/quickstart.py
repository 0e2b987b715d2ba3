"""`trl-tafs quickstart`."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from trl_tafs.cli.command import CommandOptions, parse
from trl_tafs.cli.parsing import check_numbers
from trl_tafs.output.writable import check_writable

PACKAGE = Path(__file__).resolve().parents[1]
# The example of the checkout, and where setup.py puts it in a wheel: one source.
PLACES = (PACKAGE / "embedded" / "digits", PACKAGE.parent / "examples" / "digits")


@dataclass
class QuickstartOptions(CommandOptions):
    """How long it trains, and where it writes."""

    title: ClassVar[str] = "Quickstart"

    epochs: int = field(default=40, metadata={"help": "Epochs; 40 take about a minute of a free core."})
    seed: int = field(default=0, metadata={"help": "Of everything."})
    images_per_digit: int = field(default=50, metadata={"help": "Images of each digit that are judged."})
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where all is written."})


def quickstart(argv: Sequence[str]) -> Callable[[], None]:
    """Train a 4-step generator of handwritten digits on a CPU, and show before and after; nothing is downloaded."""
    (options,) = parse([QuickstartOptions], argv, prog="trl-tafs quickstart", description=quickstart.__doc__)
    check_numbers(options, epochs=1, seed=0, images_per_digit=2)
    check_writable(options.output_dir, "--output_dir")
    script = embedded() / "quickstart.py"
    words = [word for name, value in vars(options).items() for word in (f"--{name}", str(value))]
    return lambda: runpy.run_path(str(script), run_name="trl_tafs_quickstart")["main"](words)


def embedded() -> Path:
    """Return the folder of the digits example: the wheel's copy or, of a checkout, the example itself.

    Raises:
        ValueError: it is nowhere.
    """
    for place in PLACES:
        if (place / "quickstart.py").is_file():
            return place
    raise ValueError("the digits example isn't there; install the wheel whole, or run it from a checkout")
