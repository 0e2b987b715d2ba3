"""Errors of libraries, in a line of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message that isn't blank."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
