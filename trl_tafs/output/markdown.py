"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def _table(header: Sequence[Any], rows) -> str:
    """Markdown, "" without rows; a cell's own bars and line breaks don't break it."""

    def shown(cell):
        text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
        return re.sub(r"\s+", " ", text).replace("|", "\\|")

    cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    if len(cells) == 1:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
