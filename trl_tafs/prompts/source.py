"""Where prompts come from. An epoch's prompts are a pure function of (seed, epoch)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trl_tafs.method.noise import noise_seed
from trl_tafs.method.types import PromptBatch

PromptFunction = Callable[[], tuple[str, dict[str, Any]]]


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global CPU generators seeded inside, and left as they were outside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class PromptSource:
    """Prompts with metadata, from a function, a dataset with a `prompt` column, or a sequence.

    A function is called once a group, with the global generators seeded by (seed, epoch). A dataset is walked
    through in a new order each pass; its other columns are the metadata.
    """

    def __init__(self, source: PromptFunction | Any, seed: int = 0) -> None:
        self.seed = seed
        self.function = source if callable(source) else None
        self.rows = None if callable(source) else _as_rows(source)
        self._order: tuple[int, Any] = (-1, None)  # the present sweep and its order of the rows
        if self.rows is not None and len(self.rows) == 0:
            raise ValueError("the prompt dataset is empty; it needs at least one row")

    def known(self) -> list[str]:
        """All prompts, where they are a fixed set; none of a function's."""
        if self.rows is None:
            return []
        # of a dataset the one column: others may be images, slow to decode
        if hasattr(self.rows, "select_columns"):
            return [row_to_prompt(row)[0] for row in self.rows.select_columns(["prompt"])]
        return [row_to_prompt(self.rows[i])[0] for i in range(len(self.rows))]

    def groups(self, epoch: int, num_groups: int) -> list[tuple[str, dict[str, Any]]]:
        """The (prompt, metadata) of each of an epoch's groups."""
        if self.function is not None:
            with seeded_globals(noise_seed(self.seed, epoch, "prompts")):
                return [check_prompt(self.function(), "the prompt function") for _ in range(num_groups)]
        first = epoch * num_groups
        return [self._row(position) for position in range(first, first + num_groups)]

    def batch(self, epoch: int, num_groups: int, group_size: int) -> PromptBatch:
        """The images of an epoch: `num_groups` prompts, `group_size` images each, in order."""
        return expand_groups(self.groups(epoch, num_groups), [group_size] * num_groups)

    def _row(self, position: int) -> tuple[str, dict[str, Any]]:
        sweep, offset = divmod(position, len(self.rows))
        if self._order[0] != sweep:
            generator = np.random.default_rng(noise_seed(self.seed, sweep, "order"))
            self._order = sweep, generator.permutation(len(self.rows))
        return row_to_prompt(self.rows[int(self._order[1][offset])])


def expand_groups(
    groups: Sequence[tuple[str, dict[str, Any]]], sizes: Sequence[int], first_sample: int = 0
) -> PromptBatch:
    """Each group's prompt as often as `sizes` says, in order; images are numbered from `first_sample`."""
    counts = torch.tensor(sizes)
    return PromptBatch(
        prompts=tuple(prompt for (prompt, _), size in zip(groups, sizes, strict=True) for _ in range(size)),
        metadata=tuple(metadata for (_, metadata), size in zip(groups, sizes, strict=True) for _ in range(size)),
        group_ids=torch.arange(len(groups)).repeat_interleave(counts),
        sample_ids=torch.arange(first_sample, first_sample + int(counts.sum())),
    )


def _as_rows(source: Any) -> Sequence[Any]:
    columns = getattr(source, "column_names", None)
    if isinstance(source, Mapping):
        raise ValueError(
            f"the prompts are a mapping of {', '.join(map(repr, source))}; give one split, or a list of rows"
        )
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"the prompt dataset has no column 'prompt', only {columns}; rename one")
    if isinstance(source, str) or not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(
            f"prompts come from a function, a dataset or a list of prompts, got {type(source).__name__}: {source!r}"
        )
    return source


def row_to_prompt(row: Any) -> tuple[str, dict[str, Any]]:
    """A dataset's row, a (prompt, metadata) pair or a bare prompt, as (prompt, metadata)."""
    if isinstance(row, Mapping):
        return check_prompt((row.get("prompt"), {k: v for k, v in row.items() if k != "prompt"}), "the prompt dataset")
    return check_prompt((row, {}) if isinstance(row, str) else row, "the prompt list")


def check_prompt(item: Any, origin: str) -> tuple[str, dict[str, Any]]:
    """(prompt, metadata), or an error that shows what came instead."""
    if isinstance(item, tuple) and len(item) == 2:
        prompt, metadata = item
        if isinstance(prompt, str) and (metadata is None or isinstance(metadata, Mapping)):
            return str(prompt), dict(metadata or {})
    raise ValueError(f"{origin} gave {item!r}; it must give (prompt: str, metadata: dict)")
