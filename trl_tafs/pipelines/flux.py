"""FLUX.1: dev, whose guidance is an input, and schnell, which has none."""

from __future__ import annotations

import math

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents


class TAFSFluxPipeline(PackedLatents, TAFSPipelineMixin, FluxPipeline):
    """`FluxPipeline` with annealed rollout and log-probability hooks.

    `embedded_guidance_scale` is what the stock pipeline calls `guidance_scale` (dev: 3.5 by default; schnell takes
    none), `guidance_scale` what it calls `true_cfg_scale`.
    """

    lora_target_modules = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )
    guidance_batch = None
    guidance_argument = "true_cfg_scale"
    default_embedded_guidance = 3.5
    stock_sequence_limit = 512
    counting_tokenizers = ("tokenizer_2",)
    card_tags = ("flux", "flux-diffusers")
    comfyui_shift = math.exp(1.15)
    lora_key_marks, lora_family = ("single_transformer_blocks.",), "FLUX.1"

    def few_step_sign(self) -> str | None:
        """Schnell has no embedded guidance, dev has."""
        return None if self.denoiser.config.guidance_embeds else "FLUX.1 without an embedded guidance, as schnell"

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by T5, text (B, L, C), and CLIP, pooled (B, P)."""
        text, pooled, _ = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return Embeddings(text, pooled)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        batch, rows, columns, _ = x.shape
        text = embeddings.text

        def positions() -> Tensor:
            return self._prepare_latent_image_ids(batch, rows, columns, torch.device("cpu"), text.dtype)

        return model(
            hidden_states=x.flatten(1, 2),
            timestep=timestep.to(x.dtype) / 1000,
            guidance=embeddings.guidance,
            pooled_projections=embeddings.pooled,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=self.positions("image", text, (rows, columns), positions),
            return_dict=False,
        )[0].unflatten(1, (rows, columns))

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), unscaled."""
        return super().vae_latents(self.unpacked(latents))
