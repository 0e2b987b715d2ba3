"""Command lines and files of options, read so that whatever is wrong is one line with the remedy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_tafs.output.errors import did_you_mean, one_line, shown


class UsageError(ValueError):
    """A command line, or a file of options, that can't be understood."""


def check_repeated(argv: Sequence[str], names: Sequence[str]) -> None:
    """Raise UsageError if a list option is given twice, by any of its names, of which only the last would count."""
    if sum(word.partition("=")[0] in names for word in argv) > 1:
        name = names[0]
        raise UsageError(f"{name} is given more than once, and only the last would count; write {name} A B")


def read_options(path: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the options that a YAML file holds, or a run's `training_settings.json`.

    Args:
        path: of the file.
        known: the options there are.

    Raises:
        UsageError: it can't be read, isn't `name: value` lines, has a name twice, or one that there isn't.
    """
    import yaml

    from trl_tafs.config import read_settings
    from trl_tafs.prompts.files import decode_text
    from trl_tafs.training.settings import WRITTEN

    try:
        values = yaml.load(decode_text(Path(path).read_bytes(), path), _loader())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        told = getattr(error, "problem", None) or one_line(error)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config {path}{where} can't be read: {told}") from error
    if not isinstance(values, Mapping):
        told = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise UsageError(f"--config {path} {told}; write a line `name: value` for each option")
    if set(WRITTEN) <= values.keys():  # what a run wrote, which JSON, and so YAML, is
        return read_settings(path)
    for name in values:
        if name not in known:
            raise UsageError(f"--config {path}: there is no option {shown(name)}{did_you_mean(str(name), known)}")
    return dict(values)


def _loader() -> Any:
    """Return a YAML loader that refuses a name that stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for i, key in enumerate(keys):
                if any(key.value == other.value for other in keys[:i]):
                    problem = f"{key.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def check_numbers(options: argparse.Namespace, **least: float) -> None:
    """Raise UsageError if one of the options, or of a list, is below its least value or not finite; None is taken."""
    for name, bound in least.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (math.isfinite(number) and bound <= number < 2**63):
                raise UsageError(f"--{name} is {number}; it must be at least {bound}, and finite")
