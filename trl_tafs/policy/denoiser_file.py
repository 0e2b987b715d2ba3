"""A whole denoiser on disk, in diffusers' format; and trained weights of either kind on a pipeline for a while."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import write_folder_whole
from trl_tafs.pipelines.components import denoiser_name, denoiser_of
from trl_tafs.pipelines.quantized import is_quantized
from trl_tafs.policy.adapter_file import AdapterFormatError, incomplete, read_adapter, write_scheduler
from trl_tafs.policy.carried import activate, active_adapters, adapter_layers, check_attached

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def save_denoiser(pipeline: DiffusionPipeline, folder: str | os.PathLike, *, annealed: bool = True) -> Path:
    """Write the whole denoiser in diffusers' format, in a folder of its name, and the scheduler that samples it."""
    name = denoiser_name(pipeline)
    write_scheduler(pipeline, folder, annealed=annealed)
    write_folder_whole(Path(folder, name), denoiser_of(pipeline).save_pretrained)
    return Path(folder)


def load_denoiser(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Put the weights that `save_denoiser` wrote into the pipeline's denoiser."""
    name = denoiser_name(pipeline)
    denoiser = denoiser_of(pipeline)
    saved = type(denoiser).from_pretrained(Path(folder, name), dtype=torch.float32)
    denoiser.load_state_dict(saved.state_dict())


def whole_denoiser(source: str | os.PathLike, denoiser: str = "transformer") -> Path | None:
    """Return the folder that `save_denoiser` wrote, fetched if `source` is a repository; None if it holds a LoRA."""
    if Path(source).exists():
        return Path(source) if Path(source, denoiser, "config.json").is_file() else None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(str(source), f"{denoiser}/config.json")
    except (OSError, HFValidationError):  # every answer of the Hub but the file is an OSError
        return None
    return Path(snapshot_download(str(source), allow_patterns=[f"{denoiser}/*"]))


@contextmanager
def applied(pipeline: DiffusionPipeline, source: str | os.PathLike | None) -> Iterator[None]:
    """Put a LoRA, or a denoiser that was trained whole, on the pipeline inside, and take it off afterwards.

    Args:
        pipeline: what its denoiser carries already stays active beneath.
        source: a folder or a repository on the Hub; None for the base as it is.
    """
    if source is None:
        yield
        return
    folder = whole_denoiser(source, denoiser_name(pipeline))
    if folder is None:
        with _applied_lora(pipeline, source):
            yield
        return
    denoiser = denoiser_of(pipeline)
    if is_quantized(denoiser):
        raise ValueError(f"{source} holds a whole {type(denoiser).__name__}; load its base without quantization")
    base = {name: weight.to("cpu", copy=True) for name, weight in denoiser.state_dict().items()}
    load_denoiser(pipeline, folder)
    try:
        yield
    finally:
        denoiser.load_state_dict(base)


@contextmanager
def _applied_lora(pipeline: DiffusionPipeline, source: str | os.PathLike) -> Iterator[None]:
    denoiser = denoiser_of(pipeline)
    check_attached(denoiser)
    _warn_of_a_part(pipeline, source)
    carried, name = tuple(active_adapters(denoiser)), "applied"
    try:
        pipeline.load_lora_weights(source, adapter_name=name)
    except Exception as error:  # files, the network, and what libraries make of what they find there
        raise ValueError(f"the adapter {source} can't be loaded: {first_line(error)}") from error
    activate(adapter_layers(denoiser), (*carried, name))
    try:
        yield
    finally:
        if carried:
            pipeline.delete_adapters(name)
            activate(adapter_layers(denoiser), carried)
        else:
            pipeline.unload_lora_weights()


def _warn_of_a_part(pipeline: DiffusionPipeline, source: str | os.PathLike) -> None:
    """Warn of an adapter that lacks layers; raise ValueError for one that is torn."""
    try:
        weights, config = read_adapter(source, denoiser=denoiser_name(pipeline))
    except (AdapterFormatError, FileNotFoundError):  # diffusers knows other formats and names
        return
    if fault := incomplete(weights, config, denoiser_of(pipeline)):
        warnings.warn(f"{source}: {fault}", stacklevel=2)
