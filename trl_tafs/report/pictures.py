"""The pictures of a run's fixed prompts, small enough to lie in one file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from trl_tafs.report.run import Run

EPOCHS = 24  # at most that are shown
SIDE = 320  # pixels at most
SHARP = 128  # pixels up to which a picture is kept as it is: a photograph's compression would blur it


def strip(run: Run) -> dict[str, Any]:
    """Return a run's pictures as the page shows them: epochs, prompts, and a data URI of each prompt at each epoch."""
    epochs = spread(list(run.pictures), EPOCHS)
    shown = {epoch: [data_uri(path) for path in run.pictures[epoch]] for epoch in epochs}
    whole = [epoch for epoch in epochs if all(shown[epoch])]
    count = min((len(shown[epoch]) for epoch in whole), default=0)
    prompts = [run.prompts[i] if i < len(run.prompts) else f"prompt {i + 1}" for i in range(count)]
    return {"run": run.name, "epochs": whole, "prompts": prompts, "images": [shown[e][:count] for e in whole]}


def spread(items: list[int], most: int) -> list[int]:
    """Return at most so many of the items, first and last among them, evenly chosen."""
    if len(items) <= most:
        return items
    chosen = {round(i * (len(items) - 1) / (most - 1)) for i in range(most)}
    return [items[i] for i in sorted(chosen)]


def data_uri(path: Path) -> str:
    """Return a picture for an `img`, reduced to 320 pixels; "" where it can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # a file that a kill has torn
        return ""
    small = max(image.size) <= SHARP
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if small else "WEBP", **({"optimize": True} if small else {"quality": 82}))
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
