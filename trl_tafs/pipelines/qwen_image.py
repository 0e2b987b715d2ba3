"""Qwen-Image, and Qwen-Image-Edit and -Plus, whose text encoder sees the source pictures, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents
from trl_tafs.pipelines.pictures import pictures_of

AREA = 1024 * 1024  # of a source picture, whatever its size and the image's
SEEN_AREA = 384 * 384  # as the text encoder of Plus sees it


class QwenImageMixin(PackedLatents, TAFSPipelineMixin):
    """What Qwen-Image's pipelines share.

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
        tokens, grids = x.flatten(1, 2), embeddings.picture_grids or ()
        if embeddings.pictures is not None:
            tokens = torch.cat([tokens, embeddings.pictures.to(x.dtype)], dim=1)
        return model(
            hidden_states=tokens,
            timestep=timestep.to(x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=embeddings.mask,
            encoder_hidden_states=embeddings.text,
            img_shapes=[[(1, rows, columns), *((1, *grid) for grid in grids)]] * batch,
            return_dict=False,
        )[0][:, : rows * columns].unflatten(1, (rows, columns))

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


class TAFSQwenImagePipeline(QwenImageMixin, QwenImagePipeline):
    """`QwenImagePipeline` with annealed rollout and log-probability hooks."""


class QwenImageEditMixin(QwenImageMixin):
    """What the two share: a picture is brought to a megapixel, and goes through the VAE and the text encoder."""

    needs_pictures = True
    card_tags = ("qwen-image", "qwen-image-diffusers", "qwen-image-edit")

    def _fitted(self, picture: Any, area: int) -> tuple[int, int]:
        """Return the (height, width) to which the stock pipeline brings a picture."""
        raise NotImplementedError

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """B times K pictures by the VAE: tokens (B, P, 4C), and K grids."""
        rows, grids = [], []
        for several in pictures:
            tokens = []
            for picture in several:
                height, width = self._fitted(picture, AREA)
                shown = self._shown(picture, height, width)
                pixels = self.image_processor.preprocess(shown, height, width).unsqueeze(2)
                latents = self._encode_vae_image(pixels.to(self.vae.device, self.vae.dtype), None)
                tokens.append(self._pack_latents(latents, 1, latents.shape[1], *latents.shape[3:]))
            rows.append(torch.cat(tokens, dim=1))
            sizes = [self._fitted(picture, AREA) for picture in several]
            grids.append(tuple((height // self.size_multiple, width // self.size_multiple) for height, width in sizes))
        return torch.cat(rows), grids[0]

    def _shown(self, picture: Any, height: int, width: int) -> Any:
        """Return a picture as it goes into the VAE's preprocessing."""
        return picture


class TAFSQwenImageEditPipeline(QwenImageEditMixin, QwenImageEditPipeline):
    """`QwenImageEditPipeline`, which edits a prompt's source picture."""

    max_pictures = 1

    def _fitted(self, picture: Any, area: int) -> tuple[int, int]:
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(area, picture.size[0] / picture.size[1])
        return height, width

    def _shown(self, picture: Any, height: int, width: int) -> Any:
        return self.image_processor.resize(picture, height, width)

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts and their pictures by Qwen2.5-VL: text (B, L, C), as long as the longest, and a mask."""
        images = [pictures_of(prompt)[0].image() for prompt in prompts]
        seen = [self._shown(image, *self._fitted(image, AREA)) for image in images]
        text, mask = self.encode_prompt([str(prompt) for prompt in prompts], image=seen)
        return Embeddings(text, mask=mask)


class TAFSQwenImageEditPlusPipeline(QwenImageEditMixin, QwenImageEditPlusPipeline):
    """`QwenImageEditPlusPipeline` (2509 and later), which edits or refers to several source pictures.

    The stock pipeline draws one prompt at a time; here a batch's are encoded one at a time.
    """

    max_pictures = 10

    def _fitted(self, picture: Any, area: int) -> tuple[int, int]:
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, picture.size[0] / picture.size[1])
        return height, width

    def templated(self, prompt: str) -> str:
        """Within the stock pipeline's template, after its pictures."""
        count = len(pictures_of(prompt))
        shown = (f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(count))
        return self.prompt_template_encode.format("".join(shown) + prompt)

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts and their pictures by Qwen2.5-VL: text (B, L, C), as long as the longest, and a mask."""
        found = []
        for prompt in prompts:
            images = [picture.image() for picture in pictures_of(prompt)]
            seen = [self.image_processor.resize(image, *self._fitted(image, SEEN_AREA)) for image in images]
            text, mask = self.encode_prompt([str(prompt)], image=seen)
            found.append(Embeddings(text, mask=mask))
        return Embeddings.cat(found)
