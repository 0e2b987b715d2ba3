"""Which base model a pipeline was loaded from, for caches of embeddings, evaluations and model cards alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_tafs.pipelines.components import base_dtype, denoiser_of
from trl_tafs.pipelines.quantized import is_quantized

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # `owner/name` on the Hub
# A path in the Hub's cache: .../models--OWNER--NAME/snapshots/COMMIT/...
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots(?:[/\\](\w+)|$)")


def cached_repository(path: str | Path) -> tuple[str | None, str | None]:
    """Return the repository, `owner/name`, and the commit of a path in the Hub's cache; None each if it isn't one."""
    found = _CACHED.search(str(path))
    return (f"{found[1]}/{found[2]}", found[3]) if found else (None, None)


@dataclass(frozen=True)
class BaseIdentity:
    """What a pipeline's base model is known by."""

    pipeline_class: str  # diffusers' class
    source: str  # what it was loaded from, as it was given: a repository or a folder; "" if that isn't known
    folder: Path | None  # the local folder, resolved, where `source` is one
    repo_id: str | None  # "owner/name", also for a folder that is a snapshot in the Hub's cache
    revision: str | None  # the branch, tag or commit that was asked for
    commit: str | None  # of the Hub's cache, where the weights came from it
    dtype: str  # of the denoiser's weights
    quantization: str | bool  # "4bit" or "8bit" by bitsandbytes, else whether it is quantized
    fused: tuple[str, ...] = ()  # names of LoRAs that `fuse_lora` put into the weights, as far as diffusers knows them

    @property
    def name(self) -> str:
        """The repository, or the folder's last component, or the pipeline's class."""
        return self.repo_id or (self.folder.name if self.folder else self.pipeline_class)

    @property
    def location(self) -> str:
        """The resolved folder, or the repository: one model by two paths has one location."""
        return str(self.folder) if self.folder else self.source


def base_identity(pipeline: Any) -> BaseIdentity:
    """Return which base model a pipeline has; no network.

    Args:
        pipeline: a TAFS pipeline, or one of diffusers with a denoiser and a VAE.
    """
    source = str(pipeline.config.get("_name_or_path") or "")
    folder = Path(source).resolve() if source and Path(source).is_dir() else None
    if folder is not None:
        repo_id = cached_repository(folder)[0]
    else:
        repo_id = source if REPOSITORY.fullmatch(source) else None
    weights = str(pipeline.vae.config.get("_name_or_path"))  # the VAE's path: no pipeline lacks it
    denoiser = denoiser_of(pipeline)
    bits = next((bits for bits in ("4bit", "8bit") if getattr(denoiser, f"is_loaded_in_{bits}", False)), None)
    return BaseIdentity(
        pipeline_class=(pipeline.stock_class() if hasattr(pipeline, "stock_class") else type(pipeline)).__name__,
        source=source,
        folder=folder,
        repo_id=repo_id,
        revision=getattr(pipeline, "base_revision", None),
        commit=cached_repository(weights)[1],
        dtype=str(base_dtype(denoiser)).removeprefix("torch."),
        quantization=bits or is_quantized(denoiser),
        fused=tuple(sorted(getattr(pipeline, "fused_loras", ()))),
    )
