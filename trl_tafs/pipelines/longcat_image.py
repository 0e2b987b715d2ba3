"""LongCat-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LongCatImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.lora_loading import LoraLoading
from trl_tafs.pipelines.packed import PackedLatents


class TAFSLongCatImagePipeline(PackedLatents, TAFSPipelineMixin, LongCatImagePipeline, LoraLoading):
    """`LongCatImagePipeline` with annealed rollout and log-probability hooks; prompts aren't rewritten.

    The stock pipeline has one length for every prompt, its `tokenizer_max_length`, where the image's positions start.
    """

    lora_target_modules = (
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    guidance_batch = None
    card_tags = ("longcat-image", "longcat-image-diffusers")
    lora_key_marks, lora_family = ("single_transformer_blocks.",), "LongCat-Image"

    def stock_max_sequence_length(self) -> int:
        """The stock pipeline's one length."""
        return self.tokenizer_max_length

    def check_sequence_length(self, max_sequence_length: int | None) -> None:
        """Raise ValueError for another length than the stock pipeline's."""
        if max_sequence_length not in (None, self.tokenizer_max_length):
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}, and LongCatImagePipeline takes no other than its "
                f"tokenizer_max_length, {self.tokenizer_max_length}; leave it at None"
            )

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Qwen2.5-VL: text (B, L, C), what is in quotation marks letter by letter; without a mask."""
        return Embeddings(self.encode_prompt(prompts)[0])

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, each token's norm at most the conditional one's."""
        guided = super().guide(conditional, unconditional, scale)
        norm, length = (torch.norm(v, dim=-1, keepdim=True) for v in (conditional, guided))
        return guided * (norm / (length + 1e-8)).clamp(min=0.0, max=1.0)

    def call_arguments(self, *args: Any, **options: Any) -> dict[str, Any]:
        """As in all families; the prompt stays as it is."""
        return super().call_arguments(*args, **options) | {"enable_prompt_rewrite": False}

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, rows, columns, 4C), timestep (B,) to v."""
        _, rows, columns, _ = x.shape
        start = (self.tokenizer_max_length,) * 2
        return model(
            hidden_states=x.flatten(1, 2),
            timestep=timestep.to(x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=embeddings.text,
            txt_ids=prepare_pos_ids(0, "text", num_token=embeddings.text.shape[1]).to(x.device),
            img_ids=prepare_pos_ids(1, "image", start, height=rows, width=columns).to(x.device),
            return_dict=False,
        )[0].unflatten(1, (rows, columns))

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), unscaled."""
        return super().vae_latents(self.unpacked(latents))
