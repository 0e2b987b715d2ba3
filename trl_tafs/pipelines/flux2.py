"""FLUX.2: dev, whose guidance is an input, and klein, whose base has a classifier-free one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor, nn

from trl_tafs.method.guidance import is_guided
from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents

AREA = 1024 * 1024  # of a source picture, at most


class Flux2Mixin(PackedLatents, TAFSPipelineMixin):
    """What FLUX.2's pipelines share."""

    lora_target_modules = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
        "attn.to_qkv_mlp_proj",  # of the single-stream blocks, attention and feed-forward in one
    )
    guidance_batch = None
    max_pictures = 10
    card_tags = ("flux2", "flux2-diffusers")
    comfyui_shift = math.exp(2.02)
    lora_key_marks, lora_family = (
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_transformer_blocks."),
        "FLUX.2",
    )

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by three layers of a language model: text (B, L, 3C)."""
        return Embeddings(self.encode_prompt(prompts, max_sequence_length=max_sequence_length)[0])

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """`mu` from the tokens and the number of steps."""
        if not self.scheduler.config.get("use_dynamic_shifting", False):
            return {}
        return {"mu": compute_empirical_mu(self.image_tokens(height, width), num_steps)}

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        batch, rows, columns, _ = x.shape
        text, tokens = embeddings.text, x.flatten(1, 2)
        text_ids = self.positions("text", x, text.shape[1:2], lambda: self._prepare_text_ids(text[:1]))
        image_ids = self.positions(
            "image", x, (rows, columns), lambda: self._prepare_latent_ids(x[:1].permute(0, 3, 1, 2))
        )
        if embeddings.pictures is not None:
            tokens = torch.cat([tokens, embeddings.pictures], dim=1)
            grids = embeddings.picture_grids or ()
            picture_ids = self.positions(
                "picture",
                x,
                tuple(itertools.chain(*grids)),
                lambda: self._prepare_image_ids([torch.empty(1, 1, *grid) for grid in grids]),
            )
            image_ids = torch.cat([image_ids, picture_ids.to(image_ids)], dim=1)
        return model(
            hidden_states=tokens.to(self.model_dtype),
            timestep=timestep.to(x.dtype) / 1000,
            guidance=embeddings.guidance,
            encoder_hidden_states=text,
            txt_ids=text_ids.expand(batch, -1, -1),
            img_ids=image_ids.expand(batch, -1, -1),
            return_dict=False,
        )[0][:, : rows * columns].unflatten(1, (rows, columns))

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """B times K pictures by the VAE: tokens (B, P, 4C), and K grids; one above a megapixel is made smaller."""
        rows, grids, multiple = [], [], self.size_multiple
        for several in pictures:
            for picture in several:
                self.image_processor.check_image_input(picture)  # as the stock pipeline refuses small and long ones
            fitted = [
                self.image_processor._resize_to_target_area(picture, AREA)
                if picture.size[0] * picture.size[1] > AREA
                else picture
                for picture in several
            ]
            sizes = [[side // multiple * multiple for side in picture.size] for picture in fitted]
            pixels = [
                self.image_processor.preprocess(picture, height=height, width=width, resize_mode="crop")
                for picture, (width, height) in zip(fitted, sizes, strict=True)
            ]
            place = (self.vae.device, self.vae.dtype)
            rows.append(self.prepare_image_latents(pixels, 1, None, *place)[0])
            grids.append(tuple((height // multiple, width // multiple) for width, height in sizes))
        return torch.cat(rows), grids[0]

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), by the VAE's batch statistics."""
        norm = self.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(latents)
        std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).to(latents)
        return self._unpatchify_latents(latents.permute(0, 3, 1, 2) * std + mean)


class TAFSFlux2Pipeline(Flux2Mixin, Flux2Pipeline):
    """`Flux2Pipeline` (dev) with annealed rollout and log-probability hooks.

    `embedded_guidance_scale` is what the stock pipeline calls `guidance_scale`; it has no classifier-free guidance.
    """

    default_embedded_guidance = 4.0

    def templated(self, prompt: str) -> str:
        """Below the stock pipeline's system message."""
        turns = format_input([prompt], self.system_message)
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)[0]

    @property
    def has_guidance(self) -> bool:
        """Its guidance is embedded."""
        return False

    def guidance_arguments(self, guidance_scale: float = 1.0, negative_prompt: str | None = None) -> dict[str, Any]:
        """None: it has no classifier-free guidance."""
        return {}


class TAFSFlux2KleinPipeline(Flux2Mixin, Flux2KleinPipeline):
    """`Flux2KleinPipeline` with annealed rollout and log-probability hooks; the base and the distilled models.

    The stock pipeline's negative prompt is the empty one, and its distilled models have no guidance.
    """

    def templated(self, prompt: str) -> str:
        """As a user's turn, as the stock pipeline has it."""
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Qwen3: text (B, L, 3C)."""
        for prompt in prompts if negative else ():
            self._check_negative(prompt)
        return super().embed(prompts, max_sequence_length)

    def _check_negative(self, prompt: str | None) -> None:
        if prompt:
            raise ValueError(
                f"the negative prompt is {prompt!r}, and Flux2KleinPipeline takes only the empty one; leave it out"
            )

    def few_step_sign(self) -> str | None:
        """The distilled models say so."""
        return "a distilled FLUX.2-klein" if self.config.is_distilled else None

    @property
    def has_guidance(self) -> bool:
        """Not where the model is distilled."""
        return not self.config.is_distilled

    def guidance_arguments(self, guidance_scale: float = 1.0, negative_prompt: str | None = None) -> dict[str, Any]:
        """`guidance_scale` alone."""
        if is_guided(guidance_scale):
            self._check_negative(negative_prompt)
        return {"guidance_scale": float(guidance_scale)}
