"""Encoding prompts once each, and keeping what was encoded, in memory and on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from trl_tafs.method.types import Conditioning, Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.quantized import is_bitsandbytes


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
        cache_bytes: what they may weigh.
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
        cache_bytes: int = 4 * 2**30,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.pipeline, self.device, self.offload = pipeline, device, offload
        self.cache_size, self.cache_bytes = cache_size, cache_bytes
        self.arguments = {
            "guidance_scale": guidance_scale,
            "embedded_guidance_scale": embedded_guidance_scale,
            "negative_prompts": negative_prompt,
            "max_sequence_length": max_sequence_length,
        }
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    @classmethod
    def of(cls, pipeline: TAFSPipelineMixin, config: Any, device: torch.device) -> PromptEncoder:
        """Make the encoder that a training configuration asks for."""
        return cls(
            pipeline,
            device,
            guidance_scale=config.sample_guidance_scale,
            embedded_guidance_scale=config.sample_embedded_guidance_scale,
            negative_prompt=config.negative_prompts,
            max_sequence_length=config.max_sequence_length,
            offload=config.offload_text_encoders and not config.model_cpu_offload,
            cache_dir=config.prompt_cache_dir,
        )

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
        """Encode a fixed set of prompts into the folder at once, each process its share; nothing without a folder."""
        if self.cache_dir is None:
            return
        processes = PartialState()
        share = list(dict.fromkeys(prompts))[processes.process_index :: processes.num_processes]
        self._encode([prompt for prompt in share if not self._file(prompt).exists()], keep=False)
        processes.wait_for_everyone()

    def _shrink(self) -> None:
        weight = sum(_weight(conditioning) for conditioning in self.cache.values())
        while self.cache and (len(self.cache) > self.cache_size or weight > self.cache_bytes):
            weight -= _weight(self.cache.popitem(last=False)[1])

    def _find(self, prompts: Sequence[str]) -> None:
        """Prompts from the folder, or else by the text encoders."""
        stored = [] if self.cache_dir is None else [prompt for prompt in prompts if self._file(prompt).exists()]
        for prompt in stored:
            self.cache[prompt] = _load(self._file(prompt), self.arguments["guidance_scale"])
        self._encode([prompt for prompt in prompts if prompt not in stored])

    def _encode(self, prompts: Sequence[str], keep: bool = True) -> None:
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
                if keep:
                    self.cache[prompt] = conditioning
                if self.cache_dir is not None:
                    _save(conditioning, self._file(prompt))
            self.pipeline.encoding_device = None
            self._move(encoders, torch.device("cpu"))

    def _move(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        for encoder in encoders:
            if self.offload and not is_bitsandbytes(encoder):
                encoder.to(device)

    @cached_property
    def folder(self) -> Path:
        """Where the embeddings by this pipeline's text encoders lie: those that it lacks make another embedding.

        That is `cache_dir`, or `cache_dir/without_text_encoder_3` where that one is missing. A pipeline without any
        takes `cache_dir`, unless nothing was encoded there and there is one such folder alone.
        """
        encoders = {n: m for n, m in self.pipeline.components.items() if n.startswith("text_encoder")}
        missing = [name for name, module in encoders.items() if module is None]
        if not missing:
            return self.cache_dir
        if len(missing) < len(encoders):
            return self.cache_dir / f"without_{'_and_'.join(missing)}"
        partial = list(self.cache_dir.glob("without_*"))
        return partial[0] if len(partial) == 1 and not any(self.cache_dir.glob("*.safetensors")) else self.cache_dir

    def _file(self, prompt: str) -> Path:
        """Named by all that the embedding depends on: the base model, the arguments, the dtype, the prompt."""
        base = [self.pipeline.stock_class().__name__, str(self.pipeline.config.get("_name_or_path"))]
        base += _revision(self.pipeline)
        key = json.dumps([*base, str(self.pipeline.model_dtype), self.arguments, prompt], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"


def _revision(pipeline: TAFSPipelineMixin) -> list[str]:
    """The base's commit where the Hub's cache tells it, by the VAE, which no pipeline lacks; else nothing."""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})", str(pipeline.vae.config.get("_name_or_path")))
    return [found[1]] if found else []


def _weight(conditioning: Conditioning) -> int:
    """Bytes of its tensors."""
    halves = (half for half in (conditioning.positive, conditioning.negative) if half is not None)
    values = [getattr(half, field.name) for half in halves for field in dataclasses.fields(half)]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


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
    beside = path.with_suffix(f".{uuid.uuid4().hex}.part")  # others may write it, too, on other machines
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
