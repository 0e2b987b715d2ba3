"""What an adapter is known by, so that the scores of one are not taken for another's."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch

from trl_tafs.pipelines.identity import cached_repository
from trl_tafs.policy.adapter_file import SCHEDULER_FILE, WEIGHT_NAME


def fingerprint(adapter: str | Path | None) -> str | None:
    """Return what an adapter, or a denoiser that was trained whole, is known by.

    A local one is known by a digest of its tensors: names, dtypes, shapes and bytes, and the header's metadata, which
    hold a LoRA's strength. The files' own bytes don't serve: safetensors writes a header in no fixed order. One on the
    Hub is known by its commit; if the Hub can't be asked, by the commit in the local cache, or by its name without one.

    Args:
        adapter: a file, a folder or a repository; None for no adapter, whose fingerprint is None.
    """
    if adapter is None:
        return None
    local = Path(adapter)
    return tensor_digest(local) if local.exists() else _commit(str(adapter)) or str(adapter)


def tensor_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of all tensors in a safetensors file, or in a folder's files."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]
    for file in sorted(files):
        with safe_open(file, framework="pt") as tensors:
            digest.update(repr(sorted((tensors.metadata() or {}).items())).encode())
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _commit(repo_id: str) -> str | None:
    """The commit of a repository's main branch: the Hub's, which would be loaded, or else the cached one."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(repo_id).sha
    except Exception:  # of whichever HTTP library the Hub's client has: what can't be asked is looked up in the cache
        pass
    for name in (WEIGHT_NAME, SCHEDULER_FILE, "transformer/config.json"):
        with contextlib.suppress(ValueError):  # a name that no repository has
            commit = cached_repository(str(try_to_load_from_cache(repo_id, name)))[1]
            if commit:
                return commit
    return None
