"""Files and folders that are written whole or not at all, and what a fault of the disk looks like."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | os.PathLike, content: bytes | str | Callable[[Path], object]) -> Path:
    """Write a file so that a crash at any moment leaves the old content or the new one, never a part.

    The content is written beside `path` under a name that no other writer has, synced to the disk, and renamed.

    Args:
        path: the file; its folder is made if missing.
        content: bytes, text (written as UTF-8), or a function that writes the file at the path that it is given.

    Returns:
        `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_folder_whole(folder: str | os.PathLike, fill: Callable[[Path], object]) -> Path:
    """Write a folder beside its place and put it there once it is complete.

    Args:
        folder: where it goes; one that is there is replaced.
        fill: a function that writes the content into the empty folder that it is given.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    beside = _beside(folder)
    beside.mkdir(parents=True)
    try:
        fill(beside)
        replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def replace_folder(made: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Sync a finished folder to the disk and rename it to `folder`.

    A folder cannot be renamed over another one: the old one is renamed first and removed last, and is put back if the
    new one cannot take its place. A crash between the two renames leaves both, under hidden names beside `folder`.
    """
    made, folder = Path(made), Path(folder)
    for path in made.rglob("*"):
        if path.is_file():
            _sync(path)
    old = _beside(folder)
    replacing = folder.exists()
    if replacing:
        os.replace(folder, old)
    try:
        os.replace(made, folder)
    except OSError:
        if replacing:
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_disk_fault(error: BaseException) -> bool:
    """Return whether a write failed at the disk; torch and safetensors report that by errors of their own."""
    own = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error) or "os error" in str(error)
    return isinstance(error, OSError) or own


@contextmanager
def tolerating_disk_faults(what: object) -> Iterator[None]:
    """Turn a fault of the disk inside into a warning that `what` is missing; any other error is raised.

    For what a run can do without: pictures, lines of the local log, the copy of the best adapter.
    """
    try:
        yield
    except Exception as error:  # safetensors' and torch's disk errors share no base class with OSError
        if not is_disk_fault(error):
            raise
        warnings.warn(f"{what} could not be written ({error}); the run goes on without it", stacklevel=3)
