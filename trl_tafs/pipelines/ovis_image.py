"""Ovis-Image."""

from __future__ import annotations

import torch
from diffusers import OvisImagePipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.lora_loading import LoraLoading
from trl_tafs.pipelines.packed import PackedLatents


class TAFSOvisImagePipeline(PackedLatents, TAFSPipelineMixin, OvisImagePipeline, LoraLoading):
    """`OvisImagePipeline` with annealed rollout and log-probability hooks."""

    lora_target_modules = (
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    guidance_batch = None
    stock_sequence_limit = 256
    card_tags = ("ovis-image", "ovis-image-diffusers")
    lora_key_marks, lora_family = ("single_transformer_blocks.",), "Ovis-Image"

    @property
    def uncounted_tokens(self) -> int:  # type: ignore[override]
        """Those of the system prompt, which are dropped."""
        return self.user_prompt_begin_id

    def templated(self, prompt: str) -> str:
        """After the system prompt, in a user's turn."""
        return self._get_messages(prompt)[0]

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Qwen3: text (B, L, C), zero where a prompt is padded."""
        return Embeddings(self._get_ovis_prompt_embeds(prompts, max_sequence_length=max_sequence_length))

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        batch, rows, columns, _ = x.shape
        text = embeddings.text
        place = torch.arange(text.shape[1], device=x.device, dtype=text.dtype)
        return model(
            hidden_states=x.flatten(1, 2),
            timestep=timestep.to(x.dtype) / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.stack([torch.zeros_like(place), place, place], dim=-1),
            img_ids=self._prepare_latent_image_ids(batch, rows, columns, x.device, text.dtype),
            return_dict=False,
        )[0].unflatten(1, (rows, columns))

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), unscaled."""
        return super().vae_latents(self.unpacked(latents))
