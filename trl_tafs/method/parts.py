"""How a part of the method (a kernel, a credit rule, an objective) is made from options, and brings its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, get_type_hints

from trl_tafs.method.papers import Paper
from trl_tafs.options import typed
from trl_tafs.output.errors import did_you_mean, first_line, shown


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
        own = own_options(cls, kwargs, getattr(options, kwargs), fields.keys() - read.keys() - given.keys(), read)
        values = {name: getattr(options, option) for name, option in read.items()}
        try:
            return cls(**values, **given, **own)
        except ValueError:
            raise
        except Exception as error:  # the part's own code, on what it was given
            told = f"{kwargs} is {shown(own)}, of which no {cls.__name__} can be made: {first_line(error)}"
            raise ValueError(told) from error


def own_options(
    part: Any, kwargs: str, found: Mapping[str, Any], own: set[str], read: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a mapping of a part's own options, each as the part's annotation has it.

    Args:
        part: a class or a function.
        kwargs: the option that the mapping is.
        found: the mapping.
        own: the names that the part takes.
        read: names that are set by options of the configuration, for the message.

    Raises:
        ValueError: the mapping has a key that isn't one of these, or a value of another kind.
    """
    title = getattr(part, "__name__", type(part).__name__)
    for name in found:
        if name not in own:
            there = f"its own options are {', '.join(sorted(own))}" if own else "it has no options of its own"
            elsewhere = f"; use the option {read[name]}" if read and name in read else did_you_mean(name, own)
            raise ValueError(f"{kwargs} has {name!r}, which {title} doesn't take: {there}{elsewhere}")
    try:
        hints = get_type_hints(part) if found else {}
    except (NameError, TypeError):  # names of a function in which the part was made; a callable object
        hints = {}
    return {name: typed(f"{kwargs}[{name!r}]", value, hints.get(name, Any)) for name, value in found.items()}
