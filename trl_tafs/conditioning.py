"""Encoding prompts once each, and keeping what was encoded, in memory and on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.policy import is_bitsandbytes
from trl_tafs.types import Conditioning, Embeddings


class PromptEncoder:
    """Prompts to a `Conditioning` on the training device, by a bounded cache on the CPU and one without bound on disk.

    Each prompt is encoded by itself, so that its embedding doesn't depend on its neighbours.

    Args:
        pipeline: that encodes.
        device: where the conditioning is needed.
        guidance_scale: above 1 the negative prompt is encoded too.
        embedded_guidance_scale: what a guidance-distilled denoiser is given; None for the family's default.
        negative_prompt: for all prompts.
        max_sequence_length: tokens; None for the family's default.
        offload: the text encoders stay on the CPU except while they encode.
        cache_size: prompts kept, the least recently used goes first.
        cache_dir: a folder in which encoded prompts of one base model are kept; what is found there needs no text
            encoder, which may then be missing from the pipeline. None: no such folder.
    """

    def __init__(
        self,
        pipeline: TAFSPipelineMixin,
        device: torch.device,
        *,
        guidance_scale: float = 1.0,
        embedded_guidance_scale: float | None = None,
        negative_prompt: str | None = "",
        max_sequence_length: int | None = None,
        offload: bool = False,
        cache_size: int = 1024,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.pipeline, self.device, self.offload, self.cache_size = pipeline, device, offload, cache_size
        self.arguments = {
            "guidance_scale": guidance_scale,
            "embedded_guidance_scale": embedded_guidance_scale,
            "negative_prompts": negative_prompt,
            "max_sequence_length": max_sequence_length,
        }
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts to B rows, on the device."""
        unique = list(dict.fromkeys(prompts))
        self._find([prompt for prompt in unique if prompt not in self.cache])
        for prompt in unique:
            self.cache.move_to_end(prompt)
        rows = Conditioning.cat([self.cache[prompt] for prompt in unique]).to(self.device)
        self._shrink()
        index = {prompt: i for i, prompt in enumerate(unique)}
        return rows[torch.tensor([index[prompt] for prompt in prompts], device=self.device)]

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode a fixed set of prompts into the folder at once; nothing without a folder."""
        if self.cache_dir is not None:
            self._encode([prompt for prompt in dict.fromkeys(prompts) if not self._file(prompt).exists()])
            self._shrink()

    def _shrink(self) -> None:
        while len(self.cache) > self.cache_size:
            self.cache.popitem(last=False)

    def _find(self, prompts: Sequence[str]) -> None:
        """Prompts from the folder, or else by the text encoders."""
        stored = [] if self.cache_dir is None else [prompt for prompt in prompts if self._file(prompt).exists()]
        for prompt in stored:
            self.cache[prompt] = _load(self._file(prompt), self.arguments["guidance_scale"])
        self._encode([prompt for prompt in prompts if prompt not in stored])

    def _encode(self, prompts: Sequence[str]) -> None:
        if not prompts:
            return
        encoders = [m for n, m in self.pipeline.components.items() if n.startswith("text_encoder") and m is not None]
        if not encoders:
            raise ValueError(
                f"the prompt {prompts[0]!r} isn't encoded yet, and the pipeline has no text encoder; load it with one"
                + ("" if self.cache_dir is None else f", or give the folder that has the prompt, not {self.cache_dir}")
            )
        with self.pipeline.encoding():
            self._move(encoders, self.device)
            self.pipeline.encoding_device = self.device
            for prompt in prompts:
                conditioning = self.pipeline.encode_conditioning([prompt], **self.arguments).to("cpu")
                if self.pipeline.text_multiple is not None:
                    conditioning = conditioning.padded_to_multiple(self.pipeline.text_multiple)
                self.cache[prompt] = conditioning
                if self.cache_dir is not None:
                    _save(conditioning, self._file(prompt))
            self.pipeline.encoding_device = None
            self._move(encoders, torch.device("cpu"))

    def _move(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        for encoder in encoders:
            if self.offload and not is_bitsandbytes(encoder):
                encoder.to(device)

    def _file(self, prompt: str) -> Path:
        """Named by all that the embedding depends on: the base model, the arguments, the dtype, the prompt."""
        base = [self.pipeline.stock_class().__name__, str(self.pipeline.config.get("_name_or_path"))]
        key = json.dumps([*base, str(self.pipeline.model_dtype), self.arguments, prompt], sort_keys=True)
        return self.cache_dir / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"


def _save(conditioning: Conditioning, path: Path) -> None:
    from safetensors.torch import save_file

    halves = {"positive": conditioning.positive, "negative": conditioning.negative}
    tensors = {
        f"{name}.{field.name}": value.clone()  # the halves may share a tensor
        for name, half in halves.items()
        if half is not None
        for field in dataclasses.fields(half)
        if isinstance(value := getattr(half, field.name), Tensor)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, beside)
    os.replace(beside, path)


def _load(path: Path, guidance_scale: float) -> Conditioning:
    from safetensors.torch import load_file

    halves: dict[str, dict[str, Any]] = {}
    for key, tensor in load_file(path).items():
        half, _, name = key.partition(".")
        halves.setdefault(half, {})[name] = tensor
    negative = Embeddings(**halves["negative"]) if "negative" in halves else None
    return Conditioning(Embeddings(**halves["positive"]), negative, float(guidance_scale))
