"""Z-Image, base and turbo."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


class TAFSZImagePipeline(TAFSPipelineMixin, ZImagePipeline):
    """`ZImagePipeline` with annealed rollout and log-probability hooks.

    The stock pipeline's `guidance_scale` w is off at 0, `c + w (c - u)`; here it is w + 1, off at 1 as in all families.
    """

    lora_target_modules = ("attention.to_k", "attention.to_out.0", "attention.to_q", "attention.to_v")
    guidance_batch = ("positive", "negative")
    latent_dtype = torch.float32
    patch_size = 2
    card_tags = ("z-image", "z-image-diffusers")
    comfyui_shift = 3.0
    lora_key_marks, lora_family = ("noise_refiner.",), "Z-Image"

    def templated(self, prompt: str) -> str:
        """As a user's turn, as the stock pipeline has it."""
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Qwen3: text (B, L, C) as long as the longest prompt, and its mask."""
        texts, _ = self.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        masks = [text.new_ones(len(text), dtype=torch.int64) for text in texts]
        return Embeddings(pad_sequence(texts, batch_first=True), mask=pad_sequence(masks, batch_first=True))

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """`c + (w - 1) (c - u)`, in the stock pipeline's order of operations."""
        return conditional + (scale - 1.0) * (conditional - unconditional)

    def guidance_arguments(self, guidance_scale: float = 1.0, negative_prompt: str | None = None) -> dict[str, Any]:
        """Return the stock pipeline's scale, which is off at 0."""
        arguments = super().guidance_arguments(guidance_scale, negative_prompt)
        return arguments | {"guidance_scale": max(guidance_scale - 1.0, 0.0)}

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v, float32: the model's time runs from 0 to 1, and its output is -v."""
        text = embeddings.text
        lengths = [text.shape[1]] * len(text) if embeddings.mask is None else embeddings.mask.sum(1).tolist()
        outputs = model(
            list(x.to(self.model_dtype).unsqueeze(2)),
            (1000 - timestep) / 1000,
            [row[:length] for row, length in zip(text, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)
