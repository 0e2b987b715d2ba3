"""Encode each prompt once, and keep what was encoded in memory and on disk."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from trl_tafs.method.types import Conditioning, Embeddings, map_tensors, onto
from trl_tafs.output.files import write_whole
from trl_tafs.output.writable import check_writable
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.finite import check_embeddings
from trl_tafs.pipelines.identity import base_identity
from trl_tafs.pipelines.pictures import prompt_key
from trl_tafs.pipelines.quantized import is_bitsandbytes

GIB = 2**30
DEVICE_BYTES = GIB // 2  # of encoded prompts that stay on the device: those of an epoch, in most runs
REMEMBERED = 100_000  # prompts that were encoded and dropped


class Resident:
    """Encoded prompts that stay on a device from one batch to the next: those that were used last, `DEVICE_BYTES`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.rows: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompt: str, row: Conditioning) -> Conditioning:
        """Return a prompt's conditioning, `row` on the CPU, on the device."""
        if self.device.type == "cpu":
            return row
        if prompt not in self.rows:
            self.rows[prompt] = map_tensors(row, lambda tensor: onto(tensor, self.device))
            self.bytes += _weight(row)
        self.rows.move_to_end(prompt)
        found = self.rows[prompt]
        while self.bytes > DEVICE_BYTES:
            self.bytes -= _weight(self.rows.popitem(last=False)[1])
        return found


class PromptEncoder:
    """Encode prompts, each once, and return them as a `Conditioning` on the training device.

    Encoded prompts are kept in memory on the CPU, up to a limit, and without limit in `cache_dir`, if one is given.
    Each prompt is encoded by itself, so that its embedding doesn't depend on its neighbours. A prompt with source
    pictures is known by its text and their content, whatever files they are in.

    Args:
        pipeline: whose text encoders encode.
        device: where the conditioning is needed.
        guidance_scale: above 1 the negative prompt is encoded too.
        embedded_guidance_scale: the input of a guidance-distilled denoiser; None for the family's default.
        negative_prompt: one for all prompts.
        max_sequence_length: tokens of a prompt; None for the family's default.
        offload: keep the text encoders on the CPU except while they encode.
        cache_size: most prompts in memory; the least recently used one goes first.
        cache_bytes: most bytes in memory.
        cache_dir: a folder for the encoded prompts of one base model. Prompts that are found there need no text
            encoder, so the pipeline may be loaded without.
        encoding: a context inside which the text encoders are on the device, for models that share it.
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
        encoding: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.pipeline, self.device, self.offload, self.encoding = pipeline, device, offload, encoding
        self.cache_size, self.cache_bytes = cache_size, cache_bytes
        self.arguments = {
            "guidance_scale": guidance_scale,
            "embedded_guidance_scale": embedded_guidance_scale,
            "negative_prompts": negative_prompt,
            "max_sequence_length": max_sequence_length,
        }
        self.companions: list[PromptEncoder] = []  # of the same prompts, for another guidance
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0  # of all in the cache
        self.resident = Resident(device)
        self._dropped: set[str] = set()  # prompts that had to leave it
        self._told = False
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    @classmethod
    def of(cls, pipeline: TAFSPipelineMixin, config: Any, devices: Any) -> PromptEncoder:
        """Make the encoder that a training configuration asks for, with the models where `devices` has them."""
        return cls(
            pipeline,
            devices.device,
            guidance_scale=config.sample_guidance_scale,
            embedded_guidance_scale=config.sample_embedded_guidance_scale,
            negative_prompt=config.negative_prompts,
            max_sequence_length=config.max_sequence_length,
            offload=config.offload_text_encoders and not config.model_cpu_offload,
            cache_dir=config.prompt_cache_dir,
            encoding=devices.encoding,
        )

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts, B rows on the device.

        Raises:
            ValueError: a prompt isn't encoded yet, and the pipeline was loaded without text encoders.
            NonFiniteError: a text encoder made NaN or infinity of a prompt.
        """
        unique = list(dict.fromkeys(prompts))
        self._find([prompt for prompt in unique if prompt not in self.cache])
        for prompt in unique:
            self.cache.move_to_end(prompt)
        rows = Conditioning.cat([self.resident(prompt, self.cache[prompt]) for prompt in unique])
        self._shrink()
        index = {prompt: i for i, prompt in enumerate(unique)}
        return rows[onto(torch.tensor([index[prompt] for prompt in prompts]), self.device)]

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode a fixed set of prompts into `cache_dir`, each process its share; without a folder do nothing.

        Raises:
            ValueError: prompts are to be written there (those missing of the set, or a function's, which nobody knows),
                and can't, or the disk has no room for all of them, measured by one.
        """
        if self.cache_dir is None:
            return
        processes = PartialState()
        share = list(dict.fromkeys(prompts))[processes.process_index :: processes.num_processes]
        missing = [prompt for prompt in share if not self._file(prompt).exists()]
        if missing or not prompts:
            check_writable(self.folder, "prompt_cache_dir")
        self._encode(missing[:1], keep=False)
        if len(missing) > 1:
            size, count = self._file(missing[0]).stat().st_size, (len(missing) - 1) * processes.num_processes
            note = cache_note(size, count, shutil.disk_usage(self.folder).free, self.folder)
            if note and processes.is_main_process:
                warnings.warn(note, stacklevel=2)
        self._encode(missing[1:], keep=False)
        processes.wait_for_everyone()
        for companion in self.companions:
            companion.prepare(prompts)

    def _shrink(self) -> None:
        while self.cache and (len(self.cache) > self.cache_size or self._bytes > self.cache_bytes):
            prompt, conditioning = self.cache.popitem(last=False)
            self._bytes -= _weight(conditioning)
            if len(self._dropped) < REMEMBERED:
                self._dropped.add(prompt)

    def _keep(self, prompt: str, conditioning: Conditioning) -> None:
        self.cache[prompt] = conditioning
        self._bytes += _weight(conditioning)

    def _find(self, prompts: Sequence[str]) -> None:
        """Read prompts that aren't in memory from the folder, or else encode them."""
        stored = [] if self.cache_dir is None else [prompt for prompt in prompts if self._file(prompt).exists()]
        for prompt in stored:
            self._keep(prompt, _load(self._file(prompt), self.arguments["guidance_scale"]))
        new = [prompt for prompt in prompts if prompt not in stored]
        if not self._told and not self._dropped.isdisjoint(new):
            self._told = True
            warnings.warn(
                f"prompts are encoded again that memory had no room for: it holds {len(self.cache)} of them, "
                f"{self._bytes / GIB:.2f} GiB (at most {self.cache_size}, and {self.cache_bytes / GIB:.2f} GiB); with "
                "a prompt_cache_dir each is encoded once",
                stacklevel=2,
            )
        self._encode(new)

    def _encode(self, prompts: Sequence[str], keep: bool = True) -> None:
        if not prompts:
            return
        encoders = list(self.pipeline.text_encoders().values())
        if not encoders:
            raise ValueError(
                f"the prompt {prompts[0]!r} isn't encoded yet, and the pipeline has no text encoder; load it with one"
                + ("" if self.cache_dir is None else f", or give the folder that has the prompt, not {self.cache_dir}")
            )
        with self.encoding(), self._encoding(encoders):
            for prompt in prompts:
                conditioning = self.pipeline.encode_conditioning([prompt], **self.arguments).to("cpu")
                check_embeddings(self.pipeline, conditioning, prompt)
                if self.pipeline.text_multiple is not None:
                    conditioning = conditioning.padded_to_multiple(self.pipeline.text_multiple)
                if keep:
                    self._keep(prompt, conditioning)
                if self.cache_dir is not None:
                    _save(conditioning, self._file(prompt))

    @contextmanager
    def _encoding(self, encoders: Sequence[nn.Module]) -> Iterator[None]:
        """Keep the text encoders on the device inside; leave the pipeline as it was, also if an encoder raises."""
        before = self.pipeline.encoding_device
        try:
            self._move(encoders, self.device)
            self.pipeline.encoding_device = self.device
            yield
        finally:
            self.pipeline.encoding_device = before
            self._move(encoders, torch.device("cpu"))

    def _move(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        for encoder in encoders:
            if self.offload and not is_bitsandbytes(encoder):
                encoder.to(device)

    @cached_property
    def folder(self) -> Path:
        """This pipeline's folder of embeddings: `cache_dir`, or one below it if a text encoder is missing, since the
        others embed otherwise. A pipeline without any text encoder reads whichever of the two was written.

        Example: `cache_dir/without_text_encoder_3`.
        """
        missing = self.pipeline.missing_text_encoders()
        if not missing:
            return self.cache_dir
        if self.pipeline.text_encoders():
            return self.cache_dir / f"without_{'_and_'.join(missing)}"
        partial = list(self.cache_dir.glob("without_*"))
        return partial[0] if len(partial) == 1 and not any(self.cache_dir.glob("*.safetensors")) else self.cache_dir

    def _file(self, prompt: str) -> Path:
        """Return a prompt's file, named by a digest of all that the embedding depends on: base, dtype, arguments."""
        base = base_identity(self.pipeline)
        known = [base.pipeline_class, base.source, *([base.commit] if base.commit else []), f"torch.{base.dtype}"]
        known += [f"fused {name}" for name in base.fused]
        key = json.dumps([*known, self.arguments, prompt_key(prompt)], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"


def encoder_for(encoder: PromptEncoder, guidance_scale: float) -> PromptEncoder:
    """Return an encoder for another scale of classifier-free guidance, which is prepared with the one that there is."""
    if guidance_scale == encoder.arguments["guidance_scale"]:
        return encoder
    other = copy.copy(encoder)
    other.arguments = encoder.arguments | {"guidance_scale": guidance_scale}
    other.cache, other._bytes, other._dropped, other.companions = OrderedDict(), 0, set(), []
    other.resident = Resident(encoder.device)
    encoder.companions.append(other)
    return other


def cache_note(size: int, count: int, free: int, folder: Path) -> str | None:
    """Return what encoded prompts will take on a disk, where that is much.

    Args:
        size: bytes of one.
        count: prompts that are to be written.
        free: bytes that the disk has.
        folder: on it.

    Raises:
        ValueError: the disk has no room for them.
    """
    total = size * count
    told = f"{count:,} prompts of {size / 2**20:.2f} MiB are {total / GIB:.1f} GiB; {folder} has {free / GIB:.1f} free"
    if total > free:
        raise ValueError(
            f"prompt_cache_dir: {told}; give a folder on a larger disk, fewer prompts, a smaller max_sequence_length, "
            "or leave prompt_cache_dir out"
        )
    return f"encoding into prompt_cache_dir: {told}" if total > GIB else None


def _weight(conditioning: Conditioning) -> int:
    """Return the bytes of its tensors."""
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
    } | {
        f"{name}.picture_grids": torch.tensor(half.picture_grids)
        for name, half in halves.items()
        if half is not None and half.picture_grids is not None
    }
    write_whole(path, lambda beside: save_file(tensors, beside))  # others may write it, too, on other machines


def _load(path: Path, guidance_scale: float) -> Conditioning:
    from safetensors.torch import load_file

    halves: dict[str, dict[str, Any]] = {}
    for key, tensor in load_file(path).items():
        half, _, name = key.partition(".")
        grids = name == "picture_grids"
        halves.setdefault(half, {})[name] = tuple(map(tuple, tensor.tolist())) if grids else tensor
    negative = Embeddings(**halves["negative"]) if "negative" in halves else None
    return Conditioning(Embeddings(**halves["positive"]), negative, float(guidance_scale))
