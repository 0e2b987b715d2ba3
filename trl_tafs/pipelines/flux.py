"""FLUX.1: dev, whose guidance is an input, schnell, which has none, and Kontext, which edits a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents


class FluxMixin(PackedLatents, TAFSPipelineMixin):
    """What FLUX.1's pipelines share."""

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

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by T5, text (B, L, C), and CLIP, pooled (B, P)."""
        text, pooled, _ = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return Embeddings(text, pooled)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        batch, rows, columns, _ = x.shape
        text, tokens = embeddings.text, x.flatten(1, 2)
        grids: tuple[tuple[int, int], ...] = ()
        if embeddings.pictures is not None:
            tokens = torch.cat([tokens, embeddings.pictures.to(x.dtype)], dim=1)
            grids = embeddings.picture_grids or ()

        def positions() -> Tensor:
            places = [
                self._prepare_latent_image_ids(batch, *grid, torch.device("cpu"), text.dtype)
                for grid in ((rows, columns), *grids)
            ]
            for place in places[1:]:
                place[..., 0] = 1
            return torch.cat(places)

        return model(
            hidden_states=tokens,
            timestep=timestep.to(x.dtype) / 1000,
            guidance=embeddings.guidance,
            pooled_projections=embeddings.pooled,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=self.positions("image", text, (rows, columns, *itertools.chain(*grids)), positions),
            return_dict=False,
        )[0][:, : rows * columns].unflatten(1, (rows, columns))

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), unscaled."""
        return super().vae_latents(self.unpacked(latents))


class TAFSFluxPipeline(FluxMixin, FluxPipeline):
    """`FluxPipeline` with annealed rollout and log-probability hooks.

    `embedded_guidance_scale` is what the stock pipeline calls `guidance_scale` (dev: 3.5 by default; schnell takes
    none), `guidance_scale` what it calls `true_cfg_scale`.
    """

    def few_step_sign(self) -> str | None:
        """Schnell has no embedded guidance, dev has."""
        return None if self.denoiser.config.guidance_embeds else "FLUX.1 without an embedded guidance, as schnell"


class TAFSFluxKontextPipeline(FluxMixin, FluxKontextPipeline):
    """`FluxKontextPipeline`, which edits a prompt's source picture, or draws without one.

    The picture keeps its size: the stock pipeline is told not to bring it to one of its own.
    """

    max_pictures = 1
    card_tags = ("flux", "flux-diffusers", "flux-kontext")

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """B pictures of one size by the VAE: tokens (B, P, 4C), and their one grid."""
        images, multiple = [picture for (picture,) in pictures], self.size_multiple
        width, height = (side // multiple * multiple for side in images[0].size)
        pixels = self.image_processor.preprocess(images, height, width).to(self.vae.device, self.vae.dtype)
        latents = self._encode_vae_image(pixels, None)
        return self._pack_latents(latents, *latents.shape), ((height // multiple, width // multiple),)

    def size_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Both the image and the picture keep their sizes."""
        return {"max_area": height * width, "_auto_resize": False}

    def check_size(self, height: int, width: int) -> None:
        """As in all families, and a size that the stock pipeline leaves as it is."""
        super().check_size(height, width)
        multiple, area, ratio = self.size_multiple, height * width, width / height
        kept = [round(side) // multiple * multiple for side in ((area / ratio) ** 0.5, (area * ratio) ** 0.5)]
        if kept != [height, width]:
            raise ValueError(f"FluxKontextPipeline would draw {kept[0]} x {kept[1]} for {height} x {width}; use that")
