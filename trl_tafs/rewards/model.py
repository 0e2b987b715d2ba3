"""What rewards that are networks share: device, dtype, batches, the CPU between uses, prompts that don't apply."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl_tafs.output.out_of_memory import MicroBatch


def process_device() -> str:
    """Return this process's CUDA device where there is one (before Accelerate has set it), else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype, given itself or its name as on the command line."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; use float32, bfloat16 or float16")
    return found


class ModelReward(ABC):
    """A reward whose score is a network's.

    A subclass makes its modules, hands them to `adopt`, and implements `score`, and `applies` if it scores only some
    prompts. It may say a `title`, its column in an evaluation's tables, `evaluation_options`, with which
    `trl-tafs evaluate` makes it unless told otherwise, and how many `parameters` its default model has. It can be
    called from several threads: while `offload` moves the weights, one at a time.

    Args:
        device: by default this process's CUDA device where there is one, else the CPU.
        dtype: of the weights; the arithmetic on scores is float32.
        batch_size: images at once.
        offload: keep the weights on the CPU between calls.
    """

    title: str | None = None
    evaluation_options: ClassVar[Mapping[str, Any]] = {}
    parameters: ClassVar[int] = 0  # of the default model, for a memory plan that loads none

    def __init__(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        batch_size: int = 32,
        offload: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a reward scores at least one image at once")
        self.device, self.dtype = torch.device(device or process_device()), as_dtype(dtype)
        self.batch_size, self.offload = batch_size, offload
        self.micro_batch = MicroBatch(batch_size, f"scoring ({type(self).__name__})", "its batch_size")
        self.modules: list[nn.Module] = []
        self._lock = threading.Lock()

    def adopt(self, module: nn.Module) -> nn.Module:
        """Freeze a module, and move it to where it is kept, in eval mode and the reward's dtype."""
        module = module.eval().requires_grad_(False)
        self.modules.append(module.to("cpu" if self.offload else self.device, self.dtype))
        return module

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The weights on the device within, back on the CPU after it where `offload` asks for that."""
        if not self.offload:
            yield
            return
        with self._lock:
            for module in self.modules:
                module.to(self.device)
            try:
                yield
            finally:
                for module in self.modules:
                    module.to("cpu")

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Return whether this reward scores images of this prompt."""
        return True

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores (B,) of images (B, 3, H, W), float32 in [0, 1] on the device."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores (B,), float32 on the CPU; NaN where the reward doesn't apply to the prompt."""
        rows = [i for i, (prompt, row) in enumerate(zip(prompts, metadata, strict=True)) if self.applies(prompt, row)]
        scores = torch.full((len(prompts),), torch.nan)
        if not rows:
            return scores
        with self.loaded():
            self.micro_batch(lambda size: self._score_in_batches(images, prompts, metadata, rows, scores, size))
        return scores

    def _score_in_batches(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        rows: Sequence[int],
        scores: Tensor,
        size: int,
    ) -> None:
        """Write the scores of some rows into `scores`, `size` images at once."""
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            batch = images[chosen].to(self.device, torch.float32)
            values = self.score(batch, [prompts[i] for i in chosen], [metadata[i] for i in chosen])
            scores[chosen] = values.float().cpu()


def hub_file(source: str, filename: str) -> str:
    """Return the path of a file: `source` itself, in the folder `source`, or from the Hub's repository of that name."""
    path = Path(source)
    if path.is_file():
        return str(path)
    if path.is_dir():
        if not (path / filename).is_file():
            raise ValueError(f"{path} holds no {filename}")
        return str(path / filename)
    from huggingface_hub import hf_hub_download

    return hf_hub_download(source, filename)


def load_open_clip(model_name: str, pretrained: str | None, device: torch.device | str = "cpu") -> nn.Module:
    """Return open_clip's model with its weights (a tag or a file; None: random), quick GELU where they need it."""
    import open_clip

    tag = (open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained else None) or {}
    config = {"force_quick_gelu": True} if tag.get("quick_gelu") else {}  # OpenAI's weights; else only a warning
    return open_clip.create_model(model_name, pretrained=pretrained, device=device, **config)
