"""Rollouts of an epoch that a reward's failure interrupted, kept until the epoch is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_tafs.output.files import write_whole
from trl_tafs.training.experience import ScoredBatch


class PendingRollouts:
    """The files `pending/epoch_<n>_rank_<r>.pt` of a run, one a process.

    They hold tensors and plain values alone, so that loading one runs no code.
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
        try:
            write_whole(path, lambda beside: torch.save(payload, beside))
        except Exception as error:  # the error of the reward matters more, and the other processes wait
            return f"The epoch's rollouts could not be kept ({error}); resume_from='latest' draws them again"
        number = len(payload[-1]["batches"])
        return f"The epoch's {number} rollouts are kept in {path}; resume_from='latest' goes on from them"

    def load(self, epoch: int, draw: int, key: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """Return the kept batches of an epoch's draw, if they were drawn for `key`; else none."""
        path = self.path(epoch)
        if not path.exists():
            return ()
        draws = torch.load(path, map_location="cpu", weights_only=True)
        return draws[draw]["batches"] if draw < len(draws) and draws[draw]["key"] == key else ()

    def drop(self) -> None:
        """Delete what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
