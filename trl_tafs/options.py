"""What groups of options are made of: fields with help texts, JSON mappings, checks; and what a whole run shares."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Make a dataclass field with its help text; a list or dict default is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def decode_dict(name: str, value: dict | str | None) -> dict[str, Any]:
    """Return a mapping, or one as JSON; None and "" are empty."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} isn't JSON ({error}): {value!r}; write it as '{{\"key\": value}}'") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    return value


class Options:
    """A group of options: a dataclass beside what it configures. Groups are put together by inheritance.

    A group may define `complete`, which fills in defaults that depend on other fields, and `check`, which raises
    ValueError for what can't work. Those of all groups are called, the first base last: first every `complete`, then
    every `check`.
    """

    title: ClassVar[str]  # of the group in docs/configuration.md

    def __post_init__(self) -> None:
        for stage in ("complete", "check"):
            for group in reversed(type(self).__mro__):
                if stage in vars(group):
                    vars(group)[stage](self)


def check_choice(options: Options, name: str, allowed: Collection[str]) -> None:
    """Raise ValueError if a field isn't one of `allowed`."""
    if getattr(options, name) not in allowed:
        raise ValueError(f"{name} is {getattr(options, name)!r}; use one of {', '.join(allowed)}")


def check_at_least(options: Options, least: float, *names: str) -> None:
    """Raise ValueError if one of the fields is below `least`."""
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least {least}")


def check_at_least_1_or_none(options: Options, *names: str) -> None:
    """Raise ValueError if one of the fields is below 1 and not None."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least 1, or None")


def check_positive(options: Options, *names: str) -> None:
    """Raise ValueError if one of the fields is 0, below, or NaN; None is taken."""
    for name in names:
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be above 0")


def _default_exp_name() -> str:
    return os.path.splitext(os.path.basename(sys.argv[0] or "tafs"))[0] or "tafs"


@dataclass
class RunOptions(Options):
    """Where a run writes, how long it is, and what all of its parts share."""

    title: ClassVar[str] = "Run"

    exp_name: str = field(
        default_factory=_default_exp_name,
        metadata={"help": "Name of the experiment (by default the script's): the run's folder and the tracker's run."},
    )
    run_name: str = option("", "Name of this run; empty: `exp_name`. Everything is written to `logdir/run_name`.")
    seed: int = option(0, "Seed of all noise, prompts, shuffles and of the LoRA's initial weights.")
    log_with: str | None = option(None, "Tracker of Accelerate: tensorboard, wandb, trackio or all.")
    tracker_kwargs: dict | str | None = option(None, "Keyword arguments of the tracker's init, by tracker (JSON).")
    accelerator_kwargs: dict | str | None = option(None, "Keyword arguments of `Accelerator` (JSON).")
    project_kwargs: dict | str | None = option(
        None, "Keyword arguments of Accelerate's ProjectConfiguration (JSON): project_dir, logging_dir, total_limit."
    )
    tracker_project_name: str = option("trl", "Project name that the tracker shows.")
    logdir: str = option("logs", "Folder below which a run's folder lies, unless project_kwargs names a project_dir.")
    num_epochs: int = option(100, "Epochs; one is one iteration of Algorithm 1. The paper trains 1500.")
    save_freq: int = option(1, "Epochs between checkpoints; 0: only at the end.")
    num_checkpoint_limit: int = option(5, "Checkpoints kept; the oldest goes first. The best one is kept apart.")
    mixed_precision: str = option("bf16", "no, fp16 or bf16. Trained LoRA weights are float32 always.")
    allow_tf32: bool = option(True, "TF32 matrix products on Ampere and later.")
    resume_from: str = option(
        "",
        "Checkpoint to continue from; `latest`: the newest of this run; `auto`: the newest whole one of this run, or a "
        "new run where there is none.",
    )
    disable_tqdm: bool = option(False, "No progress bars.")

    def complete(self) -> None:
        """Decode the mappings; name the run after the experiment."""
        for name in ("tracker_kwargs", "accelerator_kwargs", "project_kwargs"):
            setattr(self, name, decode_dict(name, getattr(self, name)))
        self.run_name = self.run_name or self.exp_name

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "mixed_precision", ("no", "fp16", "bf16"))
        check_at_least(self, 0, "num_epochs", "save_freq", "seed")
        check_at_least(self, 1, "num_checkpoint_limit")

    @property
    def project_dir(self) -> str:
        """Where the run writes everything."""
        return self.project_kwargs.get("project_dir") or os.path.join(self.logdir, self.run_name)
