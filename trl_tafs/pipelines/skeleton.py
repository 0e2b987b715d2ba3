"""A pipeline without weights, from its configurations alone."""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from trl_tafs.pipelines.auto import AutoTAFSPipeline, family_of
from trl_tafs.pipelines.base import TAFSPipelineMixin


def load_skeleton(
    name_or_path: str | os.PathLike,
    loader: Any = AutoTAFSPipeline,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> TAFSPipelineMixin:
    """Return a TAFS pipeline whose models lie on the meta device; only JSON files are read, or fetched from the Hub.

    Tokenizers are left out: it can't encode a prompt.

    Args:
        name_or_path: a repository on the Hub, or a folder.
        loader: `AutoTAFSPipeline`, or a pipeline class of your own.
        dtype: that `from_pretrained` would be given.
        revision: branch, tag or commit.

    Raises:
        ValueError: a pipeline of another kind, or without a denoiser's or VAE's configuration.
    """
    index = DiffusionPipeline.load_config(name_or_path, revision=revision)
    family = family_of(index["_class_name"], name_or_path) if loader is AutoTAFSPipeline else loader
    arguments: dict[str, Any] = {}
    for name in inspect.signature(family.__init__).parameters:
        entry = index.get(name)
        if isinstance(entry, (list, tuple)):
            arguments[name] = _component(name_or_path, name, *entry, dtype=dtype, revision=revision)
        elif name in index:
            arguments[name] = entry
        elif name.startswith(("tokenizer", "text_encoder")):  # HiDream's Llama comes from elsewhere
            arguments[name] = None
    return family(**{name: value for name, value in arguments.items() if name != "self"})


def _component(
    source: str | os.PathLike, name: str, library: str | None, class_name: str | None, *, dtype: Any, revision: Any
) -> Any:
    """Return a component: a model on the meta device, a scheduler, or None for what has no weights."""
    if library is None or class_name is None:
        return None
    made = getattr(import_module(library), class_name, None)
    if isinstance(made, type) and issubclass(made, SchedulerMixin):
        return made.from_pretrained(source, subfolder=name, revision=revision)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            model = made.from_config(made.load_config(source, subfolder=name, revision=revision))
        else:
            config = made.config_class.from_pretrained(source, subfolder=name, revision=revision)
            model = made._from_config(config)
    nn.Module.to(model, dtype)  # diffusers' own warns
    return model.eval().requires_grad_(False)
