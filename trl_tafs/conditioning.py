"""Encoding prompts once each, and keeping what was encoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.types import Conditioning


class PromptEncoder:
    """Prompts to a `Conditioning` on the training device, by a bounded cache on the CPU.

    Each prompt is encoded by itself, so that its embedding doesn't depend on its neighbours.

    Args:
        pipeline: that encodes.
        device: where the conditioning is needed.
        guidance_scale: above 1 the negative prompt is encoded too.
        negative_prompt: for all prompts.
        max_sequence_length: tokens; None for the family's default.
        offload: the text encoders stay on the CPU except while they encode.
        cache_size: prompts kept, the least recently used goes first.
    """

    def __init__(
        self,
        pipeline: TAFSPipelineMixin,
        device: torch.device,
        *,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = "",
        max_sequence_length: int | None = None,
        offload: bool = False,
        cache_size: int = 1024,
    ) -> None:
        self.pipeline, self.device, self.offload, self.cache_size = pipeline, device, offload, cache_size
        self.arguments = {
            "guidance_scale": guidance_scale,
            "negative_prompts": negative_prompt,
            "max_sequence_length": max_sequence_length,
        }
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts to B rows, on the device."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        if missing:
            self._encode(missing)
        unique = list(dict.fromkeys(prompts))
        for prompt in unique:
            self.cache.move_to_end(prompt)
        rows = Conditioning.cat([self.cache[prompt] for prompt in unique]).to(self.device)
        while len(self.cache) > self.cache_size:
            self.cache.popitem(last=False)
        index = {prompt: i for i, prompt in enumerate(unique)}
        return rows[torch.tensor([index[prompt] for prompt in prompts], device=self.device)]

    def _encode(self, prompts: Sequence[str]) -> None:
        encoders = [m for n, m in self.pipeline.components.items() if n.startswith("text_encoder") and m is not None]
        self._move(encoders, self.device)
        for prompt in prompts:
            self.cache[prompt] = self.pipeline.encode_conditioning([prompt], **self.arguments).to("cpu")
        if self.offload:
            self._move(encoders, torch.device("cpu"))

    def _move(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        if self.offload:
            for encoder in encoders:
                encoder.to(device)
