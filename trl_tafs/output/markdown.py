"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown, or "" without rows.

    Floats are shown with four significant digits. Line breaks within a cell become spaces, and its bars are escaped.

    Args:
        header: the columns' names.
        rows: cells of any type, as many a row as there are columns.
    """

    def shown(cell: Any) -> str:
        text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
        return re.sub(r"\s+", " ", text).replace("|", "\\|")

    cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    if len(cells) == 1:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
