"""Checkpoints: written beside and renamed into place, checked before they are read, the oldest dropped.

A checkpoint is a folder `checkpoint_<epoch>` with the adapter in diffusers' format, Accelerate's state (optimizer,
learning rate, generators, what is registered) and `trainer_state.json`; `manifest.json` lists every file's size.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl_tafs.output.files import is_disk_fault
from trl_tafs.processes import any_process

MANIFEST = "manifest.json"


STATE = "trainer_state.json"


_NAME = re.compile(r"checkpoint_(\d+)$")


class CheckpointError(RuntimeError):
    """A checkpoint that isn't there, isn't whole, or is another run's."""


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint_*") if _NAME.search(path.name)]
    return sorted(found, key=lambda path: int(_NAME.search(path.name)[1]))


def write_checkpoint(
    folder: str | os.PathLike, epoch: int, accelerator: Any, write: Callable[[Path], None], limit: int | None
) -> Path | None:
    """Write `checkpoint_<epoch>` on all processes together, and drop all but the newest `limit`.

    `write(path)` fills the folder; every process calls it (each has its own generators to save). A fault of the disk
    on any process leaves the older checkpoints as they were, and returns None on all; the reason is printed.
    """
    final = Path(folder) / f"checkpoint_{epoch:06d}"
    beside = final.with_name(f".writing_{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    fault = _disk_fault_of(write, beside)
    failed = any_process(accelerator, fault is not None)
    if not failed and accelerator.is_main_process:  # every process has written: now the list of what there is
        fault = _disk_fault_of(_write_manifest, beside)
    if failed or any_process(accelerator, fault is not None):
        if fault is not None:
            accelerator.print(
                f"checkpoint {final} could not be written: {fault}; training goes on, older ones are kept"
            )
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
        return None
    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        for old in checkpoints(folder)[: -limit if limit else None]:
            if limit:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def _disk_fault_of(write: Callable[[Path], None], folder: Path) -> Exception | None:
    """Write, and return the error if it is the disk's; any other is raised."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        if not is_disk_fault(error):
            raise
        return error
    return None


def set_aside(folder: str | os.PathLike) -> Path | None:
    """Move an earlier run's checkpoints, log and kept rollouts to `<folder>/earlier_<n>`, where a new run begins.

    Beside them the new run's checkpoints would count as the oldest and be dropped, and "latest" be the earlier run's.
    """
    names = ("checkpoints", "metrics.jsonl", "pending", "best")
    return _move_aside(Path(folder), [Path(name) for name in names if (Path(folder) / name).exists()])


def set_aside_after(folder: str | os.PathLike, epoch: int) -> Path | None:
    """Move the checkpoints of later epochs than the one that a run resumes at: they are another future's."""
    later = [p for p in checkpoints(Path(folder) / "checkpoints") if int(_NAME.search(p.name)[1]) > epoch]
    return _move_aside(Path(folder), [path.relative_to(folder) for path in later])


def _move_aside(folder: Path, names: list[Path]) -> Path | None:
    if not names:
        return None
    numbers = [int(path.name.rpartition("_")[2]) for path in folder.glob("earlier_*")]
    target = folder / f"earlier_{max(numbers, default=0) + 1}"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target / name)
    return target


def _write_manifest(folder: Path) -> None:
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    with open(folder / MANIFEST, "w") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_checkpoint(resume_from: str, folder: str | os.PathLike) -> Path:
    """The checkpoint that `resume_from` names: a folder, or "latest" of this run's `folder`.

    Raises:
        CheckpointError: it doesn't exist, or a file of it is missing or cut short; names the newest whole one.
    """
    if resume_from == "latest":
        existing = checkpoints(folder)
        if not existing:
            raise CheckpointError(f"resume_from='latest', and there is no checkpoint below {folder}")
        path = existing[-1]
    else:
        path = Path(resume_from)
        if path.is_dir() and not _NAME.search(path.resolve().name) and checkpoints(path):
            path = checkpoints(path)[-1]  # a folder of checkpoints, as DDPOTrainer takes it: its newest
    fault = torn(path)
    if fault:
        whole = [str(p) for p in reversed(checkpoints(path.parent)) if torn(p) is None]
        hint = f"resume_from={whole[0]!r} is whole" if whole else "there is no whole one beside it"
        raise CheckpointError(f"checkpoint {path} {fault}; {hint}")
    return path


def torn(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not path.is_dir():
        return "doesn't exist"
    try:
        sizes = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return f"has no {MANIFEST}: it isn't a checkpoint of TAFSGRPOTrainer, or was never finished"
    except (OSError, json.JSONDecodeError) as error:
        return f"has an unreadable {MANIFEST} ({error})"
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None:
            return f"lacks {name}"
        if found != size:
            return f"is torn: {name} has {found} bytes of {size}"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint."""
    return json.loads((path / STATE).read_text())


def write_state(path: Path, state: dict[str, Any]) -> None:
    """`trainer_state.json`, into a checkpoint that is being written."""
    (path / STATE).write_text(json.dumps(state, indent=1))


def save_pending(folder: str | os.PathLike, epoch: int, rank: int, payload: dict[str, Any]) -> Path:
    """Keep an epoch's rollouts after a fault: tensors and plain values only, so that they load safely."""
    path = Path(folder) / "pending" / f"epoch_{epoch:06d}_rank_{rank}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save(payload, beside)
    os.replace(beside, path)
    return path


def load_pending(folder: str | os.PathLike, epoch: int, rank: int) -> dict[str, Any] | None:
    """What `save_pending` kept for this epoch, or None."""
    path = Path(folder) / "pending" / f"epoch_{epoch:06d}_rank_{rank}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def drop_pending(folder: str | os.PathLike) -> None:
    """Once an epoch is done, its kept rollouts are of no use."""
    shutil.rmtree(Path(folder) / "pending", ignore_errors=True)
