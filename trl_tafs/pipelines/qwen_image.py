"""Qwen-Image."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents


class TAFSQwenImagePipeline(PackedLatents, TAFSPipelineMixin, QwenImagePipeline):
    """`QwenImagePipeline` with annealed rollout and log-probability hooks.

    `guidance_scale` is what the stock pipeline calls `true_cfg_scale`. The scheduler's `shift_terminal` is left out of
    the levels, and of the scheduler that is published with an adapter.
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
    text_multiple = 64
    stock_sequence_limit = 1024
    card_tags = ("qwen-image", "qwen-image-diffusers")
    lora_key_marks, lora_family = ("transformer_blocks.0.img_mlp.", "attn.add_q_proj"), "Qwen-Image"

    @property
    def lora_excluded_modules(self) -> list[str]:
        """The last block's text stream is discarded."""
        return [f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}.attn.to_add_out"]

    @property
    def uncounted_tokens(self) -> int:  # type: ignore[override]
        """Those of the template's beginning, which are dropped."""
        return self.prompt_template_encode_start_idx

    def templated(self, prompt: str) -> str:
        """Within the stock pipeline's template."""
        return self.prompt_template_encode.format(prompt)

    @property
    def dead_lora_modules(self) -> list[str]:
        """Of the last block's text stream only what the image's tokens attend to is used."""
        last = f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}"
        return [f"{last}.attn.add_q_proj", f"{last}.attn.to_add_out", f"{last}.txt_mlp"]

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Qwen2.5-VL: text (B, L, C), as long as the longest prompt, and a mask where they differ."""
        text, mask = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return Embeddings(text, mask=mask)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of each token's direction; its norm stays the conditional one's."""
        guided = super().guide(conditional, unconditional, scale)
        norms = (torch.norm(v, dim=-1, keepdim=True) for v in (conditional, guided))
        return guided * (next(norms) / next(norms))

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        batch, rows, columns, _ = x.shape
        return model(
            hidden_states=x.flatten(1, 2),
            timestep=timestep.to(x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=embeddings.mask,
            encoder_hidden_states=embeddings.text,
            img_shapes=[[(1, rows, columns)]] * batch,
            return_dict=False,
        )[0].unflatten(1, (rows, columns))

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, 1, H / f, W / f), one frame, unscaled by channel."""
        values = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (latents.new_tensor(value).view(1, -1, 1, 1, 1) for value in values)
        return self.unpacked(latents) / (1.0 / std) + mean

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, rows, columns, 4C) to images (B, 3, H, W), float32 in [0, 1]: the video VAE's one frame."""
        decoded = self.vae.decode(self.vae_latents(latents.to(self.vae.dtype)), return_dict=False)[0]
        return self.pixels(decoded[:, :, 0])
