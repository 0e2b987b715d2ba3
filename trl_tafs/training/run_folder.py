"""A run's folder: it can be written, it belongs to one job at a time, and what a killed job left in it is put right."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from trl_tafs.output.errors import first_line
from trl_tafs.processes import same_everywhere
from trl_tafs.training.checkpoint_files import recover

LOCK = ".lock"


class RunFolderError(OSError):
    """A run's folder that can't be written, or is another job's; the message has the remedy."""


class RunFolder:
    """Holds the lock on a run's folder, from its making until training has ended or the process does.

    The lock is a file with host, process and time, made by an exclusive create, which network disks keep to as well.
    One that a process of this host left when it was killed is taken over. Within a process the trainer that begins
    later takes over, so that a notebook can resume on the same folder. The main process alone holds it.

    Args:
        path: made if missing.
        accelerator: of the run.

    Raises:
        RunFolderError: on all processes; another job has the folder, or it can't be written. Nothing was changed there.
    """

    def __init__(self, path: str | os.PathLike, accelerator: Any) -> None:
        self.path, self.accelerator = Path(path), accelerator
        self._release: weakref.finalize | None = None
        self.take()
        if accelerator.is_main_process:
            recover(self.path)
        accelerator.wait_for_everyone()

    def take(self) -> None:
        """Take the lock, if it isn't held."""
        fault = None
        if self.accelerator.is_main_process and not (self._release is not None and self._release.alive):
            try:
                token = take_lock(self.path)
                self._release = weakref.finalize(self, release_lock, self.path, token, os.getpid())
            except OSError as error:
                fault = error
        said = same_everywhere(self.accelerator, None if fault is None else _refusal(self.path, fault))
        if said is not None:
            raise RunFolderError(said) from fault

    def release(self) -> None:
        """Let other jobs have the folder."""
        if self._release is not None:
            self._release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the folder is this trainer's; afterwards, whatever happened, it is free."""
        self.take()
        try:
            yield
        finally:
            self.release()


def take_lock(folder: Path) -> str:
    """Make the lock, and return its token.

    Raises:
        RunFolderError: another job holds it.
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, token = folder / LOCK, uuid.uuid4().hex
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "token": token}
    while True:
        with suppress(FileExistsError):
            _create(lock, json.dumps(holder | {"started": psutil.Process().create_time()}))
            return token
        other = _holder(lock)
        if other is None:
            continue  # released in between
        if reason := _living(other):
            raise RunFolderError(
                f"{folder} is in use by {reason}; give this run another run_name or project_dir, or stop that one. "
                f"If it is over, delete {lock}"
            )
        stale = lock.with_name(f"{LOCK}.{token}.part")
        with suppress(FileNotFoundError):  # another job was faster
            os.replace(lock, stale)
            if _holder(stale) != other:  # and had made its own lock by then: it gets that back
                with suppress(FileExistsError):
                    os.link(stale, lock)
            stale.unlink()


def release_lock(folder: Path, token: str, pid: int) -> None:
    """Remove the lock if it is still the one of this token; a forked child leaves its parent's alone."""
    if pid == os.getpid() and (_holder(folder / LOCK) or {}).get("token") == token:
        with suppress(OSError):
            (folder / LOCK).unlink()


def _create(lock: Path, text: str) -> None:
    """Write the lock beside, whole and synced, and link it: whoever sees it sees all of it."""
    beside = lock.with_name(f"{LOCK}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, lock)
        except FileExistsError:
            raise
        except OSError:  # a disk without links
            with lock.open("x") as file:
                file.write(text)
    finally:
        beside.unlink(missing_ok=True)


def _holder(lock: Path) -> dict[str, Any] | None:
    """Return what the lock says; None where there is none, {} where it can't be read."""
    try:
        holder = json.loads(lock.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _living(holder: dict[str, Any]) -> str | None:
    """Return who holds the lock, in words; None if that is this process, or one of this host that is dead."""
    host, pid = holder.get("host"), holder.get("pid")
    if not isinstance(host, str) or not isinstance(pid, int):
        return "a job that its lock doesn't name"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.get("since") or 0))
    if host != socket.gethostname():
        return f"process {pid} on another host, {host}, since {since}"
    if pid == os.getpid() or not _lives(pid, holder.get("started")):
        return None
    return f"process {pid} on this host since {since}"


def _lives(pid: int, started: float | None) -> bool:
    """Return whether this host has the process that began then; numbers of processes are given again."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        return not isinstance(started, float) or abs(process.create_time() - started) < 2  # clocks are set
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def _refusal(folder: Path, fault: OSError) -> str:
    if isinstance(fault, RunFolderError):
        return str(fault)
    return (
        f"the run's folder {folder} can't be written ({first_line(fault)}): checkpoints and the adapter would be lost; "
        "give another logdir or project_dir, or free the disk"
    )
