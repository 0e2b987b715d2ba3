"""What a run tells: a local JSON-lines log that is always written, averages of metrics, and sample grids."""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


class LocalTracker(GeneralTracker):
    """`metrics.jsonl` in the run's folder, one object a line; images as PNG beside it.

    A line has `step`, `time` (seconds since the epoch) and the values. A disk that is full costs the line and
    a warning, never the run.
    """

    name = "local"
    requires_logging_directory = False

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    def tracker(self) -> Path:
        """The log's path."""
        return self.folder / "metrics.jsonl"

    def store_init_configuration(self, values: dict) -> None:
        """Write the run's configuration to `config.json`."""
        self._write(self.folder / "config.json", json.dumps(values, indent=2, default=str), "w")

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """Append the numbers among `values`; NaN is written as null."""
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for key, value in values.items():
            value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) in (1, ()) else value
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, (bool, int, float, str)):
                line[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        self._write(self.tracker, json.dumps(line) + "\n", "a")

    def log_images(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """Save each image as `images/<step>_<title>.png`, several under one title numbered.

        They come as Accelerate's trackers take them: tensors (3, H, W), arrays (H, W, 3), batches of either, in [0, 1]
        or uint8, PIL images, and lists of these. What is none of them costs a warning.
        """
        for title, value in values.items():
            name = re.sub(r"[^\w.-]+", "_", str(title)).strip("_")[:100]
            try:
                images = as_images(value)
            except (TypeError, ValueError, RuntimeError) as error:  # a hook's: its pictures aren't worth the run
                warnings.warn(f"the images {str(title)[:100]!r} could not be saved ({error})", stacklevel=2)
                continue
            for i, image in enumerate(images):
                number = f"_{i}" if len(images) > 1 else ""
                save_png(image, self.folder / "images" / f"{step or 0:06d}_{name}{number}.png")

    def rewind(self, epoch: int) -> None:
        """Drop what a run that resumes before `epoch` is about to write again.

        An evaluation before `epoch` has that number itself, and stays.
        """
        if self.tracker.exists():
            lines = self.tracker.read_text().splitlines()
            kept = [line for line in lines if _position(line) < epoch]
            self._write(self.tracker, "".join(line + "\n" for line in kept), "w")

    def _write(self, path: Path, text: str, mode: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode) as file:
                file.write(text)
        except OSError as error:
            warnings.warn(f"{path} could not be written ({error}); the run goes on without it", stacklevel=3)


def _position(line: str) -> float:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # torn by a full disk or a kill
        return math.inf
    evaluation = any(name.startswith("eval/") for name in values)
    return values.get("epoch", -1) - 0.5 * evaluation


class MeanMetrics:
    """Sums metric dicts on their device; `pop` gives their means and starts anew. No host copy before that.

    What is set in `last` is given as it is.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one dict of scalars, () each."""
        for name, value in metrics.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value.detach().clone()
        self.count += 1

    def pop(self) -> dict[str, Tensor]:
        """The means since the last `pop`."""
        means = {name: total / max(self.count, 1) for name, total in self.totals.items()} | self.last
        self.totals, self.last, self.count = {}, {}, 0
        return means


class Stopwatch:
    """Seconds spent in named stretches; a stretch within another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of stretches within the present one

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stretch; `with stopwatch("rollout"):`."""
        outer, self._inner, start = self._inner, 0.0, time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner
            self._inner = outer + elapsed

    def pop(self) -> dict[str, float]:
        """`time/<name>` of each stretch since the last `pop`."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}


def as_images(value: Any) -> list[Image.Image]:
    """PIL images, arrays, tensors, batches and lists of them as PIL images in RGB."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return [value.convert("RGB")]
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in as_images(item)]
    pixels = torch.as_tensor(value)
    if pixels.ndim == 4:
        return [image for item in value for image in as_images(item)]
    if pixels.ndim == 2:
        pixels = pixels[None]
    channels = (1, 3, 4)
    first, last = pixels.shape[0] in channels, pixels.shape[-1] in channels
    if pixels.ndim != 3 or not (first or last):
        raise ValueError(f"shape {tuple(pixels.shape)} is no image; use (3, H, W) or (H, W, 3)")
    if last and not (first and isinstance(value, Tensor)):  # both fit a tiny one: tensors have channels first
        pixels = pixels.movedim(-1, 0)
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return [tensor_to_image(pixels[:3].expand(3, -1, -1))]


def tensor_to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a PIL image; below 64 pixels it is enlarged, pixel by pixel."""
    from PIL import Image

    factor = max(1, math.ceil(64 / max(image.shape[-2:])))
    pixels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def sample_grid(images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str = "") -> Image.Image:
    """A labelled picture: one row a prompt, one column a step, so that the annealing can be seen.

    Args:
        images: (P, C, 3, H, W) in [0, 1].
        rows: P labels, at the left.
        columns: C labels, on top.
        title: above all.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    tiles = [[tensor_to_image(image) for image in row] for row in images]
    width, height = tiles[0][0].size
    left = 12 + max(int(font.getlength(label[:48])) for label in rows)
    top = 40 if title else 22
    canvas = Image.new("RGB", (left + len(columns) * (width + 4), top + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 3), title, fill="black", font=font)
    for c, label in enumerate(columns):
        draw.text((left + c * (width + 4), top - 18), label, fill="black", font=font)
    for r, label in enumerate(rows):
        draw.text((4, top + r * (height + 4) + height // 2 - 7), label[:48], fill="black", font=font)
        for c, tile in enumerate(tiles[r]):
            canvas.paste(tile, (left + c * (width + 4), top + r * (height + 4)))
    return canvas


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG, making its folder; a full disk costs the picture and a warning."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}); the run goes on without it", stacklevel=2)
