"""The local log of a run, which is always written, and the Accelerator with the trackers that were asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import GeneralTracker
from accelerate.utils import KwargsHandler, ProjectConfiguration
from torch import Tensor

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.output.pictures import as_images, save_png
from trl_tafs.processes import any_process
from trl_tafs.training.launch import check_processes, fsdp_plugin, shard_on_cpu
from trl_tafs.training.options import TrainingOptions


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
        with tolerating_disk_faults(self.folder / "config.json"):
            write_whole(self.folder / "config.json", json.dumps(values, indent=2, default=str))

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """Append the numbers among `values`; NaN is written as null."""
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for key, value in values.items():
            value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) in (1, ()) else value
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, (bool, int, float, str)):
                line[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        with tolerating_disk_faults(self.tracker):
            self.folder.mkdir(parents=True, exist_ok=True)
            _append(self.tracker, json.dumps(line).encode() + b"\n")

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
        with tolerating_disk_faults(self.tracker):
            if self.tracker.exists():
                lines = self.tracker.read_bytes().splitlines()
                kept = [line for line in lines if _position(line) < epoch]
                write_whole(self.tracker, b"".join(line + b"\n" for line in kept))


def _append(path: Path, line: bytes) -> None:
    """Append a line, or nothing of it where the disk is full; what a kill left of an earlier one gets its end first."""
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


def _position(line: bytes) -> float:
    try:
        values = json.loads(line)
        evaluation = any(name.startswith("eval/") for name in values)
        return float(values.get("epoch", -1)) - 0.5 * evaluation
    except (ValueError, TypeError, AttributeError):  # torn by a kill, or of somebody else's
        return math.inf


class TolerantTracker(GeneralTracker):
    """A tracker that has started, whose later faults cost the run a warning: one a kind, however often it recurs."""

    def __init__(self, tracker: GeneralTracker) -> None:
        super().__init__(_blank=True)
        self.wrapped, self.name = tracker, tracker.name
        self.requires_logging_directory = tracker.requires_logging_directory
        self._seen: set[tuple[str, type]] = set()

    @property
    def tracker(self) -> Any:
        """The library's own object."""
        return self.wrapped.tracker

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """Log values, as far as the tracker can."""
        self._try("log", values, step=step, **kwargs)

    def log_images(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """Log images, as far as the tracker can."""
        self._try("log_images", values, step=step, **kwargs)

    def finish(self) -> None:
        """Close it, as far as it can be closed."""
        self._try("finish")

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped":  # not there yet
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(self.wrapped, method)(*args, **kwargs)
        except Exception as error:  # a service's, a disk's, a library's: no number of theirs is worth the run
            if (method, type(error)) not in self._seen:
                self._seen.add((method, type(error)))
                warnings.warn(
                    f"the tracker {self.name} failed in {method} ({first_line(error)}); training goes on, and "
                    "metrics.jsonl has every number",
                    stacklevel=3,
                )


def show_pictures(accelerator: Accelerator, pictures: dict[str, list[Any]], step: int) -> None:
    """Send PIL images, lists of them by title, to the trackers that were asked for, as each takes them.

    The local log isn't one of them: whoever shows pictures writes them to files.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = {title: np.stack([np.asarray(image) for image in images]) for title, images in pictures.items()}
            tracker.log_images(stacked, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # Accelerate's has no log_images
            trackio = import_module("trackio")
            sent = {title: [trackio.Image(image) for image in images] for title, images in pictures.items()}
            tracker.log({title: images[0] if len(images) == 1 else images for title, images in sent.items()}, step=step)
        elif not isinstance(tracker, LocalTracker):
            tracker.log_images(pictures, step=step)


def make_accelerator(config: TrainingOptions) -> tuple[Accelerator, LocalTracker]:
    """Make the `Accelerator` of a run, with the local log beside the trackers asked for.

    Raises:
        ValueError: the processes that were launched aren't those of one data-parallel run.
    """
    ours = ("automatic_checkpoint_naming", "total_limit")  # checkpoints are named and limited here
    project = {k: v for k, v in config.project_kwargs.items() if k not in ours}
    project = {"logging_dir": config.project_dir, **project, "project_dir": config.project_dir}
    local = LocalTracker(config.project_dir)
    arguments = dict(config.accelerator_kwargs)
    handlers = keyword_handlers(arguments.pop("kwargs_handlers", None) or ())
    plugin = fsdp_plugin(arguments)
    accelerator = Accelerator(
        log_with=[local] if config.log_with is None else [local, config.log_with],
        mixed_precision=config.mixed_precision,
        project_config=ProjectConfiguration(**project),
        kwargs_handlers=handlers,
        **(arguments | ({} if plugin is None else {"fsdp_plugin": plugin})),
    )
    if plugin is not None:
        shard_on_cpu(accelerator, plugin)
    check_processes(accelerator)
    return accelerator, local


def keyword_handlers(given: Sequence[KwargsHandler]) -> list[KwargsHandler]:
    """Return Accelerate's handlers with DDP's among them, the user's or ours, which never broadcasts buffers.

    Processes evaluate the denoiser by themselves (pictures, the memory plan); a broadcast would wait for the others.
    """
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    if connected and any(isinstance(item, InitProcessGroupKwargs) for item in given):
        warnings.warn(
            "InitProcessGroupKwargs come too late: the processes are connected already, with the timeout of then",
            stacklevel=4,
        )
    ours = [item for item in given if isinstance(item, DistributedDataParallelKwargs)]
    others = [item for item in given if not isinstance(item, DistributedDataParallelKwargs)]
    chosen = ours or [DistributedDataParallelKwargs()]
    return [*(dataclasses.replace(item, broadcast_buffers=False) for item in chosen), *others]


def start_trackers(accelerator: Accelerator, config: TrainingOptions, settings: dict[str, Any]) -> None:
    """Start the trackers with the run's settings; wandb and trackio are told the run's name.

    Raises:
        ValueError: one can't start, on any process; once they run, their faults are warnings.
    """
    options = {name: dict(values) for name, values in config.tracker_kwargs.items()}
    for tracker in ("wandb", "trackio"):
        if config.log_with in (tracker, "all"):
            options.setdefault(tracker, {}).setdefault("name", config.run_name)
    fault: Exception | None = None
    try:
        accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=options)
    except Exception as error:  # a service's or a library's, of whatever class
        fault = error
    if any_process(accelerator, fault is not None):
        reason = first_line(fault) if fault else "on another process"
        raise ValueError(
            f"log_with={config.log_with!r}: the tracker can't start ({reason}); mend that, or leave log_with out: "
            "metrics.jsonl is always written"
        ) from fault
    accelerator.trackers = [
        item if isinstance(item, LocalTracker) else TolerantTracker(item) for item in accelerator.trackers
    ]
