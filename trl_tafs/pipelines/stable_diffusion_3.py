"""Stable Diffusion 3 and 3.5, medium, large and turbo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.types import Conditioning, Embeddings


class TAFSStableDiffusion3Pipeline(TAFSPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with annealed rollout and log-probability hooks.

    Loads as its parent does, from SD3, SD3.5-medium, -large and -large-turbo (distilled: `guidance_scale` 1 or 0).
    """

    # The attention projections of both streams, as in diffusers' SD3 LoRA training script.
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

    @torch.no_grad()
    def encode_conditioning(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
    ) -> Conditioning:
        """Encode B prompts by the two CLIP encoders and T5: text (B, L, C), pooled (B, P)."""
        guided = guidance_scale > 1.0
        if guided and (negative_prompts is None or isinstance(negative_prompts, str)):
            negative_prompts = [negative_prompts or ""] * len(prompts)
        text, negative_text, pooled, negative_pooled = self.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            negative_prompt=list(negative_prompts) if guided else None,
            do_classifier_free_guidance=guided,
            max_sequence_length=max_sequence_length or self.default_max_sequence_length(),
        )
        negative = Embeddings(negative_text, negative_pooled) if guided else None
        return Conditioning(Embeddings(text, pooled), negative, float(guidance_scale))

    def default_max_sequence_length(self) -> int:
        """T5 tokens of a prompt: diffusers' 256, or what a smaller tokenizer can take."""
        limit = self.tokenizer_3.model_max_length if self.tokenizer_3 is not None else 256
        return min(256, limit)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v (B, C, h, w)."""
        return model(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=embeddings.text,
            pooled_projections=embeddings.pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1]."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type="pt").float()

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, H / f, W / f)."""
        channels = self.transformer.config.in_channels
        return channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """`mu` from the number of patches, where the scheduler shifts dynamically."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return {}
        _, rows, columns = self.latent_shape(height, width)
        patches = (rows // self.transformer.config.patch_size) * (columns // self.transformer.config.patch_size)
        sizes = [config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)]
        shifts = [config.get("base_shift", 0.5), config.get("max_shift", 1.16)]
        return {"mu": calculate_shift(patches, *sizes, *shifts)}
