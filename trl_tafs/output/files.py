"""Files and folders that are written whole or not at all, and what a fault of the disk looks like."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a full, broken, vanished or forbidden disk answers. A refused connection or a missing input is none of them.
DISK_ERRORS = frozenset(
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EIO EROFS EACCES EPERM ESTALE ENOENT ENOTDIR ENXIO ENODEV ETIMEDOUT".split()
    if hasattr(errno, name)  # Windows lacks some
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust, in which safetensors is written, shows an errno
_LEFT = re.compile(r"\.(.+)\.[0-9a-f]{32}\.(part|old)$")


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
        _sync(path.parent)
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
    new one cannot take its place. A crash between the two renames leaves both, under hidden names beside `folder`;
    `clean_up` puts the old one back.
    """
    made, folder = Path(made), Path(folder)
    for path in (*made.rglob("*"), made):
        _sync(path)
    old = _beside(folder, "old")
    replacing = folder.exists()
    if replacing:
        os.replace(folder, old)
    try:
        os.replace(made, folder)
    except OSError:
        if replacing:
            os.replace(old, folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: str | os.PathLike) -> None:
    """Remove a folder so that a crash leaves all of it, or none of it under its name."""
    beside = _beside(Path(folder))
    os.replace(folder, beside)
    shutil.rmtree(beside, ignore_errors=True)


def clean_up(folder: str | os.PathLike) -> None:
    """Put right what writers that were killed left below `folder`: call it before anything is written there.

    A folder that was set aside for a new one that never came is put back; what was being written is removed.
    """
    for path in sorted(Path(folder).rglob(".*")):
        match = _LEFT.match(path.name)
        if match is None or not path.exists():  # removed with the folder that it lay in
            continue
        if match[2] == "old" and not path.with_name(match[1]).exists():
            os.replace(path, path.with_name(match[1]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def save_tensors(value: Any, path: str | os.PathLike) -> None:
    """Write tensors and plain values as `torch.save` does, with the system's own error if the disk fails.

    torch's own names neither the file nor the reason, so it isn't told: what it writes after a failure goes nowhere.

    Raises:
        OSError: with its errno and the path.
    """
    import torch

    with open(path, "wb", buffering=0) as file:
        writer = _KeepsItsError(file)
        torch.save(value, writer)
    if writer.error is not None:
        raise OSError(writer.error.errno, writer.error.strerror, str(path)) from writer.error


class _KeepsItsError:
    """A file whose `write` always succeeds; `error` is the first one that the disk had."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            written = 0
            while self.error is None and written < len(view):  # a disk that is nearly full takes a part
                written += self.file.write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


def _beside(path: Path, kind: str = "part") -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}")


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some network disks sync no folders
            raise
    finally:
        os.close(descriptor)


def is_disk_fault(error: BaseException) -> bool:
    """Return whether a write failed at the disk, by the errno; safetensors has an error of its own that names it."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    named = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return named is not None and int(named[1]) in DISK_ERRORS


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
