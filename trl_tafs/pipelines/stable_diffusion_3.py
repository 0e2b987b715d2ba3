"""Stable Diffusion 3 and 3.5, medium, large and turbo."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


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
    counting_tokenizers = ("tokenizer_3",)
    stock_sequence_limit = 512
    card_tags = ("sd3", "sd3-diffusers")
    comfyui_shift = 3.0
    lora_key_marks, lora_family = ("attn.add_q_proj",), "SD3"

    @property
    def dead_lora_modules(self) -> list[str]:
        """The last block's text stream is discarded: its queries ask for nothing."""
        return [f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}.attn.add_q_proj"]

    def embedding_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """T5's tokens behind CLIP's."""
        shapes = super().embedding_shapes(length)
        return shapes | {"text": (self.tokenizer_max_length + length, shapes["text"][1])}

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by the two CLIP encoders and T5: text (B, L, C), pooled (B, P)."""
        text, _, pooled, _ = self.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return Embeddings(text, pooled)

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
