"""A micro-batch that is halved once where the GPU has no room for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class MicroBatch:
    """How many images at once some work takes; the first CUDA out-of-memory halves it, for good, and says so.

    The work's result must not depend on the number.

    Args:
        size: images at once, at least 1.
        what: the work, as a warning names it.
        setting: the option that sets the number.
    """

    def __init__(self, size: int, what: str, setting: str) -> None:
        self.size, self.what, self.setting = size, what, setting
        self.halved = False

    def __call__(self, work: Callable[[int], T]) -> T:
        """Return `work(size)`, done again from its beginning with half the size where memory ran out.

        Raises:
            torch.OutOfMemoryError: one image has no room, or half of them hadn't.
        """
        try:
            return work(self.size)
        except torch.OutOfMemoryError:
            if self.halved or self.size == 1:
                raise
        # outside of the handler, whose traceback would keep the tensors of the failed work
        before, self.size, self.halved = self.size, self.size // 2, True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"the GPU had no room for {self.what} {before} images at once; from now on {self.size}: set "
            f"{self.setting}={self.size} to begin with that",
            stacklevel=3,
        )
        return work(self.size)
