"""The files of a checkpoint: written beside and renamed into place, checked before they are read, the oldest dropped.

A checkpoint is a folder `checkpoint_<epoch>` with the adapter in diffusers' format, `states/<name>.pt` of everything
else that moves (optimizer, learning rate, averages, statistics), `generators_<rank>.pt` of each process, and
`trainer_state.json`, counters and settings; `manifest.json` lists every file's size. All of it is tensors and plain
values: loading a checkpoint runs no code of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trl_tafs.output.files import is_disk_fault, replace_folder, write_whole
from trl_tafs.processes import any_process

MANIFEST = "manifest.json"


STATE = "trainer_state.json"


STATES = "states"
STATE_OPTIONS = {  # what a run with such a state sets
    "optimizer": "every run",
    "lr_scheduler": "every run",
    "average": "train_use_ema",
    "old_policy": "old_policy_decay",
    "scaler": "mixed_precision='fp16'",
    "stat_tracker": "per_prompt_stat_tracking",
    "prompt_tracker": "group_allocation",
}
_NAME = re.compile(r"checkpoint_(\d+)$")


class Stateful(Protocol):
    """What a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take over what `state_dict` returned."""


class CheckpointError(RuntimeError):
    """A checkpoint that isn't there, isn't whole, or is another run's."""


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Return the complete checkpoints below `folder`, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint_*") if _NAME.search(path.name)]
    return sorted(found, key=epoch_of)


def epoch_of(path: Path) -> int:
    """Return the number of epochs that were done when a checkpoint was written."""
    return int(_NAME.search(path.name)[1])


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
        replace_folder(beside, final)
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
    later = [p for p in checkpoints(Path(folder) / "checkpoints") if epoch_of(p) > epoch]
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
    write_whole(folder / MANIFEST, json.dumps(sizes, indent=1))


def find_checkpoint(resume_from: str, folder: str | os.PathLike) -> Path:
    """Return the checkpoint that `resume_from` names: a folder, or "latest" of this run's `folder`.

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
    """Return what is wrong with a checkpoint, or None."""
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


# What is in it ------------------------------------------------------------------------------------------------


def save_states(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Write `states/<name>.pt` of each object: tensors and plain values alone."""
    (folder / STATES).mkdir(exist_ok=True)
    for name, item in states.items():
        torch.save(item.state_dict(), folder / STATES / f"{name}.pt")


def load_states(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Give each object the state of its name.

    Raises:
        CheckpointError: the checkpoint lacks the state of an object, or has one that no object takes.
    """
    saved = {path.stem for path in (folder / STATES).glob("*.pt")}
    for name in sorted(states.keys() ^ saved):
        option = STATE_OPTIONS.get(name, "an option of its own")
        there = (
            f"has no state {name!r}, and this run needs one"
            if name in states
            else f"has a state {name!r}, and this run takes none"
        )
        raise CheckpointError(f"checkpoint {folder} {there} ({option}); resume with the settings that it was made with")
    for name, item in states.items():
        item.load_state_dict(torch.load(folder / STATES / f"{name}.pt", map_location="cpu", weights_only=True))


def save_generators(folder: Path, rank: int) -> None:
    """Write the global generators of one process: Python's, NumPy's, torch's, each GPU's."""
    version, words, gauss = random.getstate()
    algorithm, key, *rest = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [algorithm, key.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    (folder / STATES).mkdir(exist_ok=True)
    torch.save(state, folder / f"generators_{rank}.pt")


def load_generators(folder: Path, rank: int) -> None:
    """Restore the generators of one process; of one that the saving run did not have, none."""
    path = folder / f"generators_{rank}.pt"
    if not path.is_file():
        return  # what trains has generators of its own, keyed by sample; these are for users' code
    state = torch.load(path, map_location="cpu", weights_only=True)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, key, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def read_state(path: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint."""
    return json.loads((path / STATE).read_text())


def write_state(path: Path, state: dict[str, Any]) -> None:
    """`trainer_state.json`, into a checkpoint that is being written."""
    (path / STATE).write_text(json.dumps(state, indent=1))
