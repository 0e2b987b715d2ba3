"""Rollouts of an epoch that a reward's failure or a signal interrupted, kept until the epoch is done."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import is_disk_fault, save_tensors, write_whole
from trl_tafs.training.experience import ScoredBatch


class PendingRollouts:
    """The files `pending/epoch_<n>_rank_<r>.pt` of a run, one a process.

    They hold tensors and plain values alone, so that loading one runs no code; the SHA-256 of each is beside it.
    """

    def __init__(self, folder: str | os.PathLike, rank: int) -> None:
        self.folder, self.rank = Path(folder) / "pending", rank

    def path(self, epoch: int) -> Path:
        """Return this process's file of an epoch."""
        return self.folder / f"epoch_{epoch:06d}_rank_{self.rank}.pt"

    def save(self, epoch: int, draws: Sequence[tuple[dict[str, Any], Sequence[ScoredBatch]]]) -> str:
        """Keep an epoch's draws, each with its key; return a sentence that says where, or why not."""
        path = self.path(epoch)
        payload = [{"key": key, "batches": [batch.payload() for batch in batches]} for key, batches in draws]
        number = sum(len(draw["batches"]) for draw in payload)
        try:
            _checksum(path).unlink(missing_ok=True)
            write_whole(path, lambda beside: save_tensors(payload, beside))
            with path.open("rb") as file:
                write_whole(_checksum(path), hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:  # what interrupted the epoch matters more, and the other processes wait
            if not is_disk_fault(error):
                raise
            return f"The epoch's rollouts could not be kept ({error}); resume_from='latest' draws them again"
        return f"The epoch's {number} rollouts are kept in {path}; resume_from='latest' goes on from them"

    def load(self, epoch: int, draw: int, key: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """Return the kept batches of an epoch's draw, if they were drawn for `key`; else none.

        A damaged file is none, with a warning.
        """
        path = self.path(epoch)
        if not path.exists():
            return ()
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != _checksum(path).read_text():
                raise ValueError("its content is not what was written")
            draws = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, ValueError) as error:
            warnings.warn(f"the rollouts in {path} are drawn again: {first_line(error)}", stacklevel=2)
            return ()
        return draws[draw]["batches"] if draw < len(draws) and draws[draw]["key"] == key else ()

    def drop(self) -> None:
        """Delete what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")
