"""Chroma: FLUX.1-schnell's successor with classifier-free guidance and T5 alone."""

from __future__ import annotations

from diffusers import ChromaPipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents


class TAFSChromaPipeline(PackedLatents, TAFSPipelineMixin, ChromaPipeline):
    """`ChromaPipeline` with annealed rollout and log-probability hooks."""

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
    stock_sequence_limit = 512
    card_tags = ("chroma", "chroma-diffusers")
    lora_key_marks, lora_family = ("distilled_guidance_layer.", "single_transformer_blocks."), "Chroma"

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by T5: text (B, L, C), and a mask that leaves one token of padding beside the prompt's own."""
        text, mask = self._get_t5_prompt_embeds(prompts, max_sequence_length=max_sequence_length)
        return Embeddings(text, mask=mask)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        batch, rows, columns, _ = x.shape
        text = embeddings.text
        return model(
            hidden_states=x.flatten(1, 2),
            timestep=timestep.to(x.dtype) / 1000,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=self._prepare_latent_image_ids(batch, rows, columns, x.device, text.dtype),
            attention_mask=self._prepare_attention_mask(batch, rows * columns, x.dtype, embeddings.mask),
            return_dict=False,
        )[0].unflatten(1, (rows, columns))

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), unscaled."""
        return super().vae_latents(self.unpacked(latents))
