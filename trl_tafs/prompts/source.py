"""Where prompts come from. An epoch's prompts are a pure function of (seed, epoch)."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trl_tafs.method.allocation import PromptWeights
from trl_tafs.method.noise import noise_seed
from trl_tafs.method.types import PromptBatch
from trl_tafs.pipelines.pictures import SOURCES, PicturedPrompt, pictured, source_pictures
from trl_tafs.rewards.scoring import check_signature, copy_metadata

CHECKED_AT_ONCE = 10_000  # rows of a dataset
SHOWN_FAULTS = 5
PromptFunction = Callable[[], tuple[str, dict[str, Any]]]


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global CPU generators inside, and put them back afterwards."""
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
    through in a new order each pass; its other columns are the metadata. What is handed out is a copy: nothing that is
    done to it comes back to the source.

    `source_image`, or `source_images`, a list, are the pictures that a prompt is to edit: paths or PIL images, which
    the metadata holds in RGB then.

    Raises:
        ValueError: when made, if any row of a list or dataset has no prompt, which names the first such rows; when
            drawn, if the function's call gives none.
    """

    def __init__(self, source: PromptFunction | Any, seed: int = 0) -> None:
        self.seed = seed
        self.function = source if callable(source) else None
        if self.function is not None:
            check_signature(self.function, "the prompt function", "")
        self.rows = None if callable(source) else _as_rows(source)
        self._known: list[str] | None = None  # all prompts, once they were asked for
        self._order: tuple[int, Any] = (-1, None)  # the present sweep and its order of the rows
        if self.rows is not None:
            if len(self.rows) == 0:
                raise ValueError("the prompt dataset is empty; it needs at least one row")
            faults = [(f"row {i}", fault) for i, row in _scan(self.rows) if (fault := prompt_fault(row))]
            if faults:
                raise ValueError(f"the prompts (rows counted from 0): {describe_faults(faults)}")

    def known(self) -> list[str]:
        """Return all prompts if they are a fixed set, and none if they come from a function."""
        return [] if self.rows is None else [_known(row) for _, row in _scan(self.rows, SOURCES)]

    def check_fixed(self) -> None:
        """Raise ValueError if the prompts come from a function, so that there is no set to draw from by weight."""
        if self.rows is None:
            raise ValueError(
                "group_allocation='superflow' draws prompts by weight from a fixed set, and these come from a "
                "function; give a list or a dataset"
            )

    def by_weight(self, epoch: int, num_groups: int, weigh: PromptWeights) -> list[tuple[str, dict[str, Any]]]:
        """Return the (prompt, metadata) of each of an epoch's groups, drawn by `weigh(prompts) -> (P,)` above 0.

        A function of (seed, epoch, weights). One after the other, each is drawn from those that are left with a
        probability in proportion to its weight; when none is left, from all again.
        """
        self.check_fixed()
        if self._known is None:
            self._known = self.known()
        weights = np.asarray(weigh(self._known), dtype=np.float64)
        generator, drawn = np.random.default_rng(noise_seed(self.seed, epoch, "by weight")), []
        while len(drawn) < num_groups:  # the first of P alarms, each of rate w, rings in proportion to w
            drawn += np.argsort(generator.standard_exponential(len(weights)) / weights, kind="stable").tolist()
        return [row_to_prompt(self.rows[row]) for row in drawn[:num_groups]]

    @property
    def names_pictures(self) -> bool:
        """Whether rows of a fixed set may have source pictures; a dataset's columns say so."""
        if self.rows is None:
            return False
        columns = getattr(self.rows, "column_names", None)
        if columns is not None:
            return any(name in columns for name in SOURCES)
        rows = (row[1] if isinstance(row, tuple) else row for row in self.rows)
        return any(isinstance(row, Mapping) and any(name in row for name in SOURCES) for row in rows)

    def all(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (prompt, metadata) of every row, a copy; none if they come from a function."""
        return [] if self.rows is None else [row_to_prompt(self.rows[i]) for i in range(len(self.rows))]

    def scanned(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (prompt, metadata) of every row, not copied: to be looked at only. None of a function's."""
        for i in range(0 if self.rows is None else len(self.rows)):
            row = self.rows[i]
            if isinstance(row, Mapping):
                yield row["prompt"], row
            else:
                yield (row[0], row[1] or {}) if isinstance(row, tuple) else (row, {})

    def groups(self, epoch: int, num_groups: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the (prompt, metadata) of each of an epoch's groups."""
        if self.function is not None:
            with seeded_globals(noise_seed(self.seed, epoch, "prompts")):
                return [
                    check_prompt(self.function(), "the prompt function", f" (call {i} of epoch {epoch})")
                    for i in range(num_groups)
                ]
        first = epoch * num_groups
        return [self._row(position) for position in range(first, first + num_groups)]

    def batch(self, epoch: int, num_groups: int, group_size: int) -> PromptBatch:
        """Return the images of an epoch: `num_groups` prompts, `group_size` images each, in order."""
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
    """Repeat each group's prompt as often as `sizes` says, in order; images are numbered from `first_sample`."""
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
    if hasattr(source, "iloc"):
        raise ValueError("the prompts are a table of pandas; give its .to_dict('records'), of one column its .tolist()")
    if isinstance(source, str) or not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(
            f"prompts come from a function, a dataset or a list of prompts, got {type(source).__name__}: {source!r}"
        )
    return list(source) if isinstance(source, (list, tuple)) else source


def _scan(rows: Sequence[Any], beside: Sequence[str] = ()) -> Iterator[tuple[int, Any]]:
    """Every row with its number; of a dataset the prompt alone, in batches, as other columns may be slow to decode.

    Where it has a column of `beside`, whole rows.
    """
    if any(name in (getattr(rows, "column_names", None) or ()) for name in beside):
        names = [name for name in ("prompt", *beside) if name in rows.column_names]
        chosen = rows.select_columns(names) if hasattr(rows, "select_columns") else rows
        yield from ((i, chosen[i]) for i in range(len(chosen)))
        return
    if not hasattr(rows, "select_columns"):
        yield from enumerate(rows if isinstance(rows, list) else map(rows.__getitem__, range(len(rows))))
        return
    column = rows.select_columns(["prompt"])
    try:
        column[:1]
    except Exception:  # a transform of the user's that makes the prompt of other columns
        column = rows
    for start in range(0, len(rows), CHECKED_AT_ONCE):
        yield from enumerate(column[start : start + CHECKED_AT_ONCE]["prompt"], start)


def _prompt_of(row: Any) -> Any:
    """What a row has as its prompt; a pair is (prompt, metadata)."""
    if isinstance(row, Mapping):
        return row.get("prompt")
    return row[0] if isinstance(row, tuple) and len(row) == 2 else row


def _known(row: Any) -> Any:
    """A row's prompt, with the pictures that it names; they aren't read."""
    metadata = row if isinstance(row, Mapping) else row[1] if isinstance(row, tuple) else None
    pictures = source_pictures(metadata or {})
    return PicturedPrompt(_prompt_of(row), pictures) if pictures else _prompt_of(row)


def prompt_fault(row: Any) -> str | None:
    """Say what is wrong with a row's prompt; None for nothing."""
    prompt = _prompt_of(row)
    if isinstance(prompt, str):
        if not prompt or prompt.isspace():
            return "the prompt is empty"
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            return f"the prompt {prompt!r:.80} has half a surrogate pair, which is no character"
        if isinstance(row, tuple) and not (row[1] is None or isinstance(row[1], Mapping)):
            return f"{reprlib.repr(row)} must be (prompt: str, metadata: dict)"
        return None
    if isinstance(row, Mapping) and "prompt" not in row:
        return f"there is no 'prompt', only {reprlib.repr(list(row))}"
    return f"the prompt is {reprlib.repr(prompt)}, not text"


def describe_faults(faults: Sequence[tuple[str, str]]) -> str:
    """Return the first of the rows that are wrong, as (place, fault) each, in one line."""
    shown = "; ".join(f"{where}: {fault}" for where, fault in faults[:SHOWN_FAULTS])
    return shown + (f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else "")


def row_to_prompt(row: Any) -> tuple[str, dict[str, Any]]:
    """Return a dataset's row, a (prompt, metadata) pair or a bare prompt, as (prompt, metadata), a copy."""
    if isinstance(row, Mapping):
        return check_prompt((row.get("prompt"), {k: v for k, v in row.items() if k != "prompt"}), "the prompt dataset")
    return check_prompt((row, {}) if isinstance(row, str) else row, "the prompt list")


def check_prompt(item: Any, origin: str, where: str = "") -> tuple[str, dict[str, Any]]:
    """Return (prompt, metadata), a copy; raise ValueError, showing what came instead, if it is none."""
    fault = prompt_fault(item)
    if fault is None and isinstance(item, tuple):
        try:
            return pictured(str(item[0]), copy_metadata(item[1] or {}))
        except ValueError as error:
            raise ValueError(f"{origin}, {item[0]!r:.80}{where}: {error}") from error
    told = f" ({fault})" if fault else ""
    raise ValueError(f"{origin} gave {item!r}{where}; it must give (prompt: str, metadata: dict){told}")
