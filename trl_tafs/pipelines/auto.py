"""`AutoTAFSPipeline`: the family of a repository, or of a pipeline that is already loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from diffusers import DiffusionPipeline

from trl_tafs.pipelines import families
from trl_tafs.pipelines.base import TAFSPipelineMixin

_CLASSES = [getattr(import_module(module), name) for name, module in families.FAMILIES.items()]
FAMILIES: dict[str, type[TAFSPipelineMixin]] = {family.stock_class().__name__: family for family in _CLASSES}
_HUB_OPTIONS = (
    *("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "local_dir"),
    "local_dir_use_symlinks",
)


def _refusal(found: str) -> str:
    return (
        f"{found}, for which there is no TAFS family; there are {', '.join(FAMILIES)}. A new family is a short class: "
        "see docs/new_family.md"
    )


def family_of(name: str, source: str | os.PathLike) -> type[TAFSPipelineMixin]:
    """Return the family of a diffusers pipeline's class; raise ValueError if there is none, naming where it is from."""
    if name not in FAMILIES:
        raise ValueError(_refusal(f"{source} holds a {name}"))
    return FAMILIES[name]


class AutoTAFSPipeline:
    """Make the TAFS pipeline of a model, of whichever family it is; the class has no instances."""

    def __init__(self) -> None:
        raise TypeError("AutoTAFSPipeline has no instances; use from_pretrained(...) or from_pipe(...)")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **options: Any) -> TAFSPipelineMixin:
        """As `DiffusionPipeline.from_pretrained`, by the class that the `model_index.json` names.

        Args:
            name_or_path: a repository on the Hub, or a folder.
            **options: as the family's own `from_pretrained` takes them: dtype, quantization_config, revision, ...

        Raises:
            ValueError: a pipeline of another kind; the families are named.
        """
        hub_options = {name: options[name] for name in _HUB_OPTIONS if name in options}
        name = DiffusionPipeline.load_config(name_or_path, **hub_options)["_class_name"]
        return family_of(name, name_or_path).from_pretrained(name_or_path, **options)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline) -> TAFSPipelineMixin:
        """Return the TAFS pipeline over a loaded diffusers pipeline's own components: nothing is copied, cast or moved.

        Adapters, quantization, tiling and device are what they were, since they are the modules'.

        Raises:
            ValueError: a pipeline of another kind; the families are named.
        """
        if isinstance(pipe, TAFSPipelineMixin):
            return pipe
        family = next((FAMILIES[base.__name__] for base in type(pipe).__mro__ if base.__name__ in FAMILIES), None)
        if family is None:
            raise ValueError(_refusal(f"this is a {type(pipe).__name__}"))
        names = set(inspect.signature(family.__init__).parameters) - {"self"} - set(pipe.components)
        made = family(**pipe.components, **{name: pipe.config[name] for name in names if name in pipe.config})
        made.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
        made._merged_adapters = set(getattr(pipe, "fused_loras", ()))  # what `fused_loras` tells: it is in the weights
        made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return made


def guess_family(keys: Iterable[str]) -> str | None:
    """Return the families that a LoRA's keys look like, in words, by the longest mark that they have."""
    text = "\n".join(keys)
    found: dict[str, dict[str, None]] = {}
    for family in FAMILIES.values():
        for mark in family.lora_key_marks:
            if mark in text:
                found.setdefault(mark, {})[family.lora_family] = None
    if not found:
        return None
    return " or ".join(found[max(found, key=len)])
