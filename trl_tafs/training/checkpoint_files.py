"""The files of a checkpoint: written beside and renamed into place, checked before they are read, the oldest dropped.

A checkpoint is a folder `checkpoint_<epoch>` with the adapter in diffusers' format, `states/<name>.pt` of everything
else that moves (optimizer, learning rate, averages, statistics), `generators_<rank>.pt` of each process, and
`trainer_state.json`, counters and settings; `manifest.json` lists every file's size and SHA-256. All of it is tensors
and plain values: loading a checkpoint runs no code of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import clean_up, is_disk_fault, remove_folder, replace_folder, save_tensors, write_whole
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
    "fake_score": "dm_weight",
    "stat_tracker": "per_prompt_stat_tracking",
    "prompt_tracker": "group_allocation",
}
_KEYED_BY_PROMPT = ("stat_tracker",)
_NAME = re.compile(r"checkpoint_(\d+)$")
_WRITING = ".writing_"
_SETTING_ASIDE = ".setting_aside"


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
    beside = final.with_name(f"{_WRITING}{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    fault = _disk_fault_of(write, beside)
    failed = any_process(accelerator, fault is not None)
    if not failed and accelerator.is_main_process:  # every process has written: now the list of what there is

        def put_in_place(path: Path) -> None:
            _write_manifest(path)
            replace_folder(path, final)

        fault = _disk_fault_of(put_in_place, beside)
    if failed or any_process(accelerator, fault is not None):
        if fault is not None:
            accelerator.print(
                f"checkpoint {final} could not be written: {fault}; training goes on, older ones are kept, and the "
                "next epoch's end tries again"
            )
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
        return None
    if accelerator.is_main_process:
        for old in checkpoints(folder)[:-limit] if limit else ():
            remove_folder(old)
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


def recover(folder: str | os.PathLike) -> None:
    """Put right what a killed run left in its folder, so that nothing that was complete is lost.

    A complete checkpoint that still has its temporary name gets its own, what was being moved aside is moved back, and
    half-written files are removed. Call it before anything is read or written there.
    """
    folder = Path(folder)
    for path in (folder / "checkpoints").glob(f"{_WRITING}checkpoint_*"):
        final = path.with_name(path.name.removeprefix(_WRITING))
        if final.exists() or torn(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, final)
    clean_up(folder)
    if (folder / _SETTING_ASIDE).is_dir():
        for path in sorted((folder / _SETTING_ASIDE).iterdir()):
            os.replace(path, folder / path.name)
        (folder / _SETTING_ASIDE).rmdir()


def set_aside(folder: str | os.PathLike) -> Path | None:
    """Move an earlier run's checkpoints, log and kept rollouts to `<folder>/earlier_<n>`, where a new run begins.

    Beside them the new run's checkpoints would count as the oldest and be dropped, and "latest" be the earlier run's.
    """
    folder = Path(folder)
    names = [name for name in ("checkpoints", "metrics.jsonl", "pending", "best") if (folder / name).exists()]
    if not names:
        return None
    target, moving = _next_earlier(folder), folder / _SETTING_ASIDE
    moving.mkdir()
    for name in names:
        os.replace(folder / name, moving / name)
    os.replace(moving, target)  # all of it or, after a kill before this, none: `recover` moves it back
    return target


def set_aside_after(folder: str | os.PathLike, epoch: int) -> Path | None:
    """Move the checkpoints of later epochs than the one that a run resumes at, and a copy of the log that is cut back.

    They are another future's.
    """
    folder = Path(folder)
    later = [path for path in checkpoints(folder / "checkpoints") if epoch_of(path) > epoch]
    if not later:
        return None
    target = _next_earlier(folder)
    (target / "checkpoints").mkdir(parents=True)
    if (folder / "metrics.jsonl").exists():
        shutil.copy2(folder / "metrics.jsonl", target / "metrics.jsonl")
    for path in later:
        os.replace(path, target / "checkpoints" / path.name)
    return target


def _next_earlier(folder: Path) -> Path:
    found = (re.fullmatch(r"earlier_(\d+)", path.name) for path in folder.glob("earlier_*"))
    return folder / f"earlier_{max((int(match[1]) for match in found if match), default=0) + 1}"


# Whole or not ---------------------------------------------------------------------------------------------------


def _write_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_whole(folder / MANIFEST, json.dumps({"files": files, "sha256": _digest(files)}, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(files: Mapping[str, Any]) -> str:
    """Return what tells that the list of files itself was changed."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def listed_files(path: Path) -> dict[str, dict[str, Any]]:
    """Return the files of a checkpoint by its manifest, with their `bytes` and `sha256`.

    Raises:
        ValueError: it has none, or one that can't be read or was changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        whole = manifest["sha256"] == _digest(files) and all(
            {"bytes", "sha256"} <= entry.keys() for entry in files.values()
        )
    except FileNotFoundError:
        raise ValueError(
            f"has no {MANIFEST}: it isn't a checkpoint of TAFSGRPOTrainer, or was never finished"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"has an unreadable {MANIFEST} ({first_line(error)})") from error
    if not whole:
        raise ValueError(f"is damaged: {MANIFEST} is not as it was written")
    return files


def torn(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; every byte is read."""
    if not path.is_dir():
        return "doesn't exist"
    try:
        files = listed_files(path)
        for name, entry in files.items():
            if not (path / name).is_file():
                return f"lacks {name}"
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"is torn: {name} has {size} bytes of {entry['bytes']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"is damaged: the content of {name} is not what was written"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"can't be read ({first_line(error)})"
    return None


def whole_beside(path: Path) -> str:
    """Return, in words, what can be resumed from instead of a checkpoint that can't be used: the newest whole one."""
    others = (p for p in reversed(checkpoints(path.parent)) if p != path)
    whole = next((p for p in others if torn(p) is None), None)
    return "there is no whole one beside it" if whole is None else f"resume_from={str(whole)!r} is whole"


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn any error inside into a CheckpointError that names the checkpoint, what of it was read, and a whole one."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of JSON, torch, safetensors, PEFT and of whatever takes over a state
        raise CheckpointError(
            f"checkpoint {path}: {what} can't be used ({first_line(error)}); {whole_beside(path)}"
        ) from error


def find_checkpoint(resume_from: str, folder: str | os.PathLike) -> Path | None:
    """Return the checkpoint that `resume_from` names: a folder, or "latest" or "auto" of this run's `folder`.

    "auto" is the newest whole one, with a warning that names newer ones that are damaged; None where there is none at
    all.

    Raises:
        CheckpointError: it doesn't exist, or a file of it is missing, cut short or changed; names the newest whole one.
    """
    existing = checkpoints(folder)
    if resume_from == "auto":
        return _newest_whole(existing)
    if resume_from == "latest":
        if not existing:
            raise CheckpointError(f"resume_from='latest', and there is no checkpoint below {folder}")
        path = existing[-1]
    else:
        path = Path(resume_from)
        if path.is_dir() and not _NAME.search(path.resolve().name) and checkpoints(path):
            path = checkpoints(path)[-1]  # a folder of checkpoints, as DDPOTrainer takes it: its newest
    if fault := torn(path):
        raise CheckpointError(f"checkpoint {path} {fault}; {whole_beside(path)}")
    return path


def _newest_whole(existing: list[Path]) -> Path | None:
    faults = []
    for path in reversed(existing):
        fault = torn(path)
        if fault is None:
            if faults:
                warnings.warn(f"resume_from='auto' takes {path}, since {'; '.join(faults)}", stacklevel=2)
            return path
        faults.append(f"{path} {fault}")
    if faults:
        raise CheckpointError(
            f"resume_from='auto', and no checkpoint is whole: {'; '.join(faults)}; leave resume_from out for a new "
            "run, which moves them aside"
        )
    return None


# What is in it ------------------------------------------------------------------------------------------------


def save_states(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Write `states/<name>.pt` of each object: tensors and plain values alone."""
    (folder / STATES).mkdir(exist_ok=True)
    for name, item in states.items():
        save_tensors(item.state_dict(), folder / STATES / f"{name}.pt")


def load_states(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Give each object the state of its name.

    Raises:
        CheckpointError: the checkpoint lacks the state of an object, or has one that no object takes, or one that the
            object can't take.
    """
    saved = {Path(name).stem for name in listed_files(folder) if name.startswith(f"{STATES}/")}
    for name in sorted(states.keys() ^ saved):
        option = STATE_OPTIONS.get(name, "an option of its own")
        there = (
            f"has no state {name!r}, and this run needs one"
            if name in states
            else f"has a state {name!r}, and this run takes none"
        )
        raise CheckpointError(f"checkpoint {folder} {there} ({option}); resume with the settings that it was made with")
    for name, item in states.items():
        with reading(folder, f"{STATES}/{name}.pt"):
            state = torch.load(folder / STATES / f"{name}.pt", map_location="cpu", weights_only=True)
            if name not in _KEYED_BY_PROMPT and state.keys() != item.state_dict().keys():
                raise ValueError(
                    f"it has {sorted(state)}, not {sorted(item.state_dict())}"
                )  # a schedule takes anything
            item.load_state_dict(state)


def generators() -> dict[str, Any]:
    """Return the states of this process's global generators: Python's, NumPy's, torch's, each GPU's."""
    version, words, gauss = random.getstate()
    algorithm, key, *rest = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [algorithm, key.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(state: dict[str, Any]) -> None:
    """Inverse of `generators`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, key, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the global generators as they were, whatever is drawn from them inside."""
    state = generators()
    try:
        yield
    finally:
        set_generators(state)


def save_generators(folder: Path, rank: int) -> None:
    """Write the global generators of one process."""
    save_tensors(generators(), folder / f"generators_{rank}.pt")


def load_generators(folder: Path, rank: int) -> None:
    """Restore the generators of one process; of one that the saving run did not have, none."""
    path = folder / f"generators_{rank}.pt"
    if not path.is_file():
        return  # what trains has generators of its own, keyed by sample; these are for users' code
    with reading(folder, path.name):
        set_generators(torch.load(path, map_location="cpu", weights_only=True))


def read_state(path: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint.

    Raises:
        CheckpointError: it can't be read, or isn't one.
    """
    with reading(path, STATE):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name in ("progress", "settings"):
            if not isinstance(state, dict) or not isinstance(state.get(name), dict):
                raise ValueError(f"it has no mapping {name!r}")
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """`trainer_state.json`, into a checkpoint that is being written."""
    (path / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
