"""The adapters that commands are given: the one that draws, and those that lie frozen beneath it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_tafs.cli.parsing import UsageError
from trl_tafs.output.errors import first_line, one_line


class Frozen(NamedTuple):
    """One item of `--frozen_adapters`."""

    name: str  # by which PEFT and the card know it
    source: str  # a folder, a file or a repository
    weight: float


def read_frozen(items: Sequence[str] | None) -> list[Frozen]:
    """Read `SOURCE` or `SOURCE=WEIGHT`; an adapter is named after its source.

    Raises:
        UsageError: a weight is no finite number, or two adapters would have one name.
    """
    found: list[Frozen] = []
    for item in items or ():
        source, equals, weight = item.rpartition("=")
        source, weight = (source, weight) if equals else (item, "1")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not source or not math.isfinite(number):
            raise UsageError(f"--frozen_adapters has {item!r}; write a folder or repository, or one with =WEIGHT")
        name = re.sub(r"\W", "_", Path(source).name.removesuffix(".safetensors")) or "frozen"
        if name in [other.name for other in found]:
            raise UsageError(f"--frozen_adapters has two adapters named {name!r}; copy one to a folder of another name")
        found.append(Frozen(name, source, number))
    return found


def load_frozen(pipeline: Any, items: Sequence[str] | None) -> None:
    """Load `--frozen_adapters` into the pipeline, each at its weight.

    Raises:
        ValueError: one can't be loaded; says which and why.
    """
    adapters = read_frozen(items)
    for adapter in adapters:
        check_adapter(adapter.source)
        try:
            pipeline.load_lora_weights(adapter.source, adapter_name=adapter.name)
        except Exception as error:  # files, the network, and what libraries make of what they find there
            raise ValueError(f"--frozen_adapters {adapter.source} can't be loaded: {one_line(error)}") from error
    if adapters:
        pipeline.set_adapters([adapter.name for adapter in adapters], [adapter.weight for adapter in adapters])


def check_adapter(name: str) -> None:
    """Raise ValueError if a local adapter isn't there or is none, before its base is loaded; `none` is the base."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    from trl_tafs.policy.adapter_file import WEIGHT_NAME

    folder, fault = Path(name), ""
    if folder.is_dir():
        found = (folder / "transformer").is_dir() or any(folder.glob("*.safetensors"))
        fault = "" if found else f"the folder holds no {WEIGHT_NAME}"
    elif name != "none" and not folder.is_file():
        try:
            hf_hub_download(name, WEIGHT_NAME)
        except (RepositoryNotFoundError, HFValidationError) as error:
            fault = f"there is no such folder, and no such repository on the Hub ({first_line(error)})"
        except Exception:  # no network, or a file of another name: loading says what is wrong
            return
    if fault:
        raise ValueError(f"the adapter {name} can't be loaded: {fault}; give the folder that training wrote")
