"""A field of a configuration with its help text, and dictionaries given as JSON."""

from __future__ import annotations

import json
from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; a list or dict default is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def decode_dict(name: str, value: dict | str | None) -> dict[str, Any]:
    """A mapping, or one as JSON; None and "" are empty."""
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
