"""What groups of options are made of: fields with help texts, JSON mappings, checks; and what a whole run shares."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from trl_tafs.output.errors import did_you_mean, one_line, shown
from trl_tafs.output.secrets import remember_all

T = TypeVar("T")

MAX_DEPTH = 32  # of a mapping's values
MAX_SEED = 4_000_000_000  # numpy takes 32 bits, and each process adds its number
PROJECT_OPTIONS = {  # of Accelerate's ProjectConfiguration
    "project_dir": str | None,
    "logging_dir": str | None,
    "total_limit": int | None,
    "automatic_checkpoint_naming": bool,
    "iteration": int,
    "save_on_each_node": bool,
}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Make a dataclass field with its help text; a list or dict default is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def decode_dict(name: str, value: Mapping | str | None) -> dict[str, Any]:
    """Return a mapping, or one as JSON, copied through; None and "" are empty. What it holds as secrets is remembered.

    Raises:
        ValueError: it isn't one, or holds a key that isn't text, a key twice, or a number that isn't finite.
    """
    if value is None or (isinstance(value, str) and not value):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            told = f"{name} isn't JSON ({one_line(error)}): {shown(value)}; write it as '{{\"key\": value}}'"
            raise ValueError(told) from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {shown(value)}")
    found = _copied(name, value)
    remember_all(found)
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice, of {', '.join(found)}")
    return found


def _copied(place: str, value: Any, depth: int = 0) -> Any:
    """Return nested mappings and lists as copies; objects, which have no place in JSON, are let be."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{place} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{place} has the key {shown(wrong[0])}; keys must be text")
        return {key: _copied(f"{place}[{key!r}]", item, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(f"{place}[{i}]", item, depth + 1) for i, item in enumerate(value))
    with contextlib.suppress(TypeError):
        value = _plain(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and not math.isfinite(value):
        raise ValueError(f"{place} is {shown(value)}; it must be a finite number")
    return value


def typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value as its annotation has it: bool, int, float, str, list[...], a mapping, or None where it may be.

    Numbers of numpy and torch are converted, integers where numbers are asked for, paths where text is. What has
    another annotation is let be.

    Raises:
        ValueError: it is something else, or a number that isn't finite; names the field, the value and what it can be.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if dict in (get_origin(kind) or kind for kind in kinds):
        return decode_dict(name, value)
    if value is None and type(None) in kinds:
        return None
    known = [kind for kind in kinds if (get_origin(kind) or kind) in KINDS]
    if not known or len(known) + (type(None) in kinds) < len(kinds):
        return value
    for kind in known:
        if get_origin(kind) is list:
            return _typed_list(name, value, get_args(kind)[0], type(None) in kinds)
        try:
            return KINDS[kind][0](_plain(value))
        except (TypeError, OverflowError):
            continue
    allowed = [KINDS[kind][1] for kind in known] + ["None"] * (type(None) in kinds)
    raise ValueError(f"{name} is {shown(value)}; it must be {' or '.join(allowed)}")


def _typed_list(name: str, value: Any, kind: Any, optional: bool) -> list[Any]:
    try:
        items = value.tolist() if hasattr(value, "tolist") else value  # of numpy and torch
    except (RuntimeError, NotImplementedError):  # torch's meta device
        items = None
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)) or not items:
        other = " or None" if optional else ""
        raise ValueError(f"{name} is {shown(value)}; it must be a list with at least one item{other}")
    return [typed(f"{name}[{i}]", item, kind) for i, item in enumerate(items)]


def _plain(value: Any) -> Any:
    """Return Python's own number for a scalar of numpy or torch; raise TypeError for one without a value."""
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except RuntimeError as error:  # torch's meta device
        raise TypeError from error


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _int(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise TypeError
    return int(value)


def _float(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise TypeError
    return number


def _str(value: Any) -> str:
    text = os.fspath(value)  # raises TypeError for all but text, bytes and paths
    if not isinstance(text, str) or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise TypeError
    return str.__str__(text)  # an enum's value


KINDS: dict[Any, tuple[Any, str]] = {
    bool: (_bool, "True or False"),
    int: (_int, "an integer of at most 64 bits"),
    float: (_float, "a finite number"),
    str: (_str, "text (in YAML, in quotes)"),
    list: (None, ""),
}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields; of a class that was made in a function, of its bases' alone."""
    for base in cls.__mro__:
        try:
            hints = get_type_hints(base)
        except NameError:
            continue
        return {field.name: hints[field.name] for field in fields(cls) if field.init and field.name in hints}
    return {}


class Options:
    """A group of options: a dataclass beside what it configures. Groups are put together by inheritance.

    All fields are first checked by their annotations (`typed`). A group may define `complete`, which fills in defaults
    that depend on other fields, and `check`, which raises ValueError for what can't work. Those of all groups are
    called, the first base last: first every `complete`, then every `check`.
    """

    title: ClassVar[str]  # of the group in docs/configuration.md

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            setattr(self, name, typed(name, getattr(self, name), hint))
        for stage in ("complete", "check"):
            for group in reversed(type(self).__mro__):
                if stage in vars(group):
                    vars(group)[stage](self)


def own_copy(options: T) -> T:
    """Return a copy whose lists and mappings are its own; what can't be copied in them (a handler) is shared."""
    copied = copy.copy(options)
    for name, value in vars(options).items():
        try:
            setattr(copied, name, copy.deepcopy(value))
        except Exception:  # the value's own code can't
            setattr(copied, name, copy.copy(value))
    return copied


def check_choice(options: Options, name: str, allowed: Collection[str]) -> None:
    """Raise ValueError if a field isn't one of `allowed`."""
    if (value := getattr(options, name)) not in allowed:
        raise ValueError(f"{name} is {shown(value)}; use one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def check_at_least(options: Options, least: float, *names: str) -> None:
    """Raise ValueError if one of the fields is below `least`; None is taken."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least {least}")


def check_at_most(options: Options, most: float, *names: str) -> None:
    """Raise ValueError if one of the fields is above `most`; None is taken."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) > most:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at most {most}")


def check_at_least_1_or_none(options: Options, *names: str) -> None:
    """Raise ValueError if one of the fields is below 1 and not None."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least 1, or None")


def check_positive(options: Options, *names: str) -> None:
    """Raise ValueError if one of the fields is 0 or below; None is taken."""
    for name in names:
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be above 0")


def check_share(options: Options, *names: str) -> None:
    """Raise ValueError if one of the fields is below 0, or 1 or above."""
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must lie in [0, 1)")


def check_not_empty(options: Options, *names: str) -> None:
    """Raise ValueError if one of the fields is text without a character; None is taken."""
    for name in names:
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise ValueError(f"{name} is {getattr(options, name)!r}; give a name, or leave it out")


def _default_exp_name() -> str:
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    return name if re.fullmatch(r"\w[\w.-]*", name) else "tafs"  # `python -c` has no script


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
    save_freq: int | None = option(
        None,
        "Epochs between checkpoints; 0: only at the end. None: one when the last is older than 20 times what it took "
        "to write, so that they are at most 5 percent of the time.",
    )
    num_checkpoint_limit: int = option(5, "Checkpoints kept; the oldest goes first. The best one is kept apart.")
    mixed_precision: str = option("bf16", "no, fp16 or bf16. Trained LoRA weights are float32 always.")
    allow_tf32: bool = option(True, "TF32 matrix products on Ampere and later.")
    resume_from: str = option(
        "",
        "Checkpoint to continue from; `latest`: the newest of this run; `auto`: the newest whole one of this run, or a "
        "new run where there is none.",
    )
    preflight_rollout: bool = option(
        True, "Before training, draw two images and score them, to stop at once where pictures or rewards are broken."
    )
    disable_tqdm: bool = option(False, "No progress bars.")

    def complete(self) -> None:
        """Name the run after the experiment."""
        self.run_name = self.run_name or self.exp_name

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "mixed_precision", ("no", "fp16", "bf16"))
        check_at_least(self, 0, "num_epochs", "save_freq", "seed")
        check_at_most(self, MAX_SEED, "seed")
        check_at_least(self, 1, "num_checkpoint_limit")
        check_not_empty(self, "exp_name", "log_with", "tracker_project_name", "logdir")
        for name, value in self.tracker_kwargs.items():
            if not isinstance(value, dict):
                raise ValueError(f"tracker_kwargs[{name!r}] is {shown(value)}; it must be a mapping, by tracker")
        self._check_project()

    def _check_project(self) -> None:
        for name, value in self.project_kwargs.items():
            place = f"project_kwargs[{name!r}]"
            if name not in PROJECT_OPTIONS:
                known = did_you_mean(name, PROJECT_OPTIONS)
                raise ValueError(f"{place} is no option; use {', '.join(PROJECT_OPTIONS)}{known}")
            value = self.project_kwargs[name] = typed(place, value, PROJECT_OPTIONS[name])
            if value == "" or (name == "total_limit" and value is not None and value < 1):
                raise ValueError(f"{place} is {shown(value)}; it must be at least 1, or left out")

    @property
    def project_dir(self) -> str:
        """Where the run writes everything."""
        return self.project_kwargs.get("project_dir") or os.path.join(self.logdir, self.run_name)
