"""How a part of the method (a kernel, a credit rule, an objective) is made from options, and brings its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from trl_tafs.method.papers import Paper


class Part:
    """A frozen dataclass that says by which options its fields are set.

    `reads` names the option behind each field. Fields that it doesn't name are the part's own: they have defaults, and
    are set by a mapping (`sampler_kwargs`, `credit_kwargs`, `objective_kwargs`).
    """

    reads: ClassVar[Mapping[str, str]] = {}
    description: ClassVar[str]  # a phrase for the model card
    paper: ClassVar[Paper | None] = None  # where it comes from, if that isn't TAFS-GRPO's: cited on the card

    @classmethod
    def _fields(cls) -> dict[str, dataclasses.Field[Any]]:
        return {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]

    @classmethod
    def _made(cls, options: Any, kwargs: str, **given: Any) -> Self:
        """Return the part with its fields from `options`, those in `given`, and its own from the option `kwargs`.

        Raises:
            ValueError: the mapping has a key that isn't one of the part's own options.
        """
        fields = cls._fields()
        read = {name: option for name, option in cls.reads.items() if name in fields and name not in given}
        check_own_options(
            cls.__name__, kwargs, getattr(options, kwargs), fields.keys() - read.keys() - given.keys(), read
        )
        return cls(
            **{name: getattr(options, option) for name, option in read.items()}, **given, **getattr(options, kwargs)
        )


def check_own_options(
    part: str, kwargs: str, found: Mapping[str, Any], own: set[str], read: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError if a mapping of a part's own options has a key that the part doesn't take."""
    for name in found:
        if name not in own:
            there = f"its own options are {', '.join(sorted(own))}" if own else "it has no options of its own"
            elsewhere = f"; use the option {read[name]}" if read and name in read else ""
            raise ValueError(f"{kwargs} has {name!r}, which {part} doesn't take: {there}{elsewhere}")
