"""Errors in a line of ours: those of libraries, words that nearly are others, packages that aren't there."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from trl_tafs.output.secrets import hide

LONGEST = 1000  # characters of a line
LONGEST_VALUE = 200


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message that isn't blank, without secrets."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return hide(f"{type(error).__name__}: {lines[0] if lines else ''}")


def one_line(error: BaseException) -> str:
    """Return an error's whole message in one line, without secrets; its class where there is no message."""
    text = hide(" ".join(str(error).split()))
    return text[:LONGEST] or type(error).__name__


def shown(value: Any) -> str:
    """Return a value for a message: in one line, cut where it is long, without secrets."""
    try:
        text = repr(value)
    except Exception:  # of a value that was given: an int of 5,000 digits, an object whose own code raises
        text = f"a {type(value).__name__}"
    return hide(" ".join(text.split()))[:LONGEST_VALUE]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known word that is most like this one, or "" where none is."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def require(module: str, what: str, extra: str) -> ModuleType:
    """Import a module that one of the package's extras brings.

    Raises:
        ImportError: it isn't there, with pip's line; or it can't be imported, with the reason.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f'pip install "trl_tafs[{extra}]"'
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or package).partition(".")[0] == package
        told = "" if missing else f", which can't be imported ({first_line(error)})"
        raise ImportError(f"{what} needs {package}{told}: {remedy}") from error
