"""HiDream-I1."""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from diffusers import HiDreamImagePipeline
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


class TAFSHiDreamPipeline(TAFSPipelineMixin, HiDreamImagePipeline):
    """`HiDreamImagePipeline` with annealed rollout and log-probability hooks.

    Its routed experts compute without gradient in eval mode. Rollout and replay both run them as in training, which is
    the same function in another order of summation: the rollout is the stock pipeline's up to float rounding.

    HiDream's repositories come without Llama: `from_pretrained` is given `text_encoder_4` and `tokenizer_4`, as the
    stock pipeline's is (docs/adapters.md). On the command line, `examples/hidream_llama.py` does it.
    """

    lora_target_modules = (
        *("attn1.to_k", "attn1.to_out", "attn1.to_q", "attn1.to_v"),
        *("attn1.to_k_t", "attn1.to_out_t", "attn1.to_q_t", "attn1.to_v_t"),
    )
    patch_size = 2
    counting_tokenizers = ("tokenizer_3", "tokenizer_4")
    card_tags = ("hidream", "hidream-diffusers")
    lora_key_marks, lora_family = ("double_stream_blocks.",), "HiDream"

    def embedding_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """T5's (L, C), Llama's layers (K, L, C), and both CLIPs' pooled (P,)."""
        config = self.denoiser.config
        text, llama = config.caption_channels
        layers = (max(config.llama_layers) + 1, length, llama)
        return {"text": (length, text), "layers": layers, "pooled": (config.text_emb_dim,)}

    def stand_in_for_values(self, denoiser: nn.Module) -> str | None:
        """Send each token through one expert as often as it is routed: as many rows as the experts have together."""

        def forward(self: MOEFeedForwardSwiGLU, x: Tensor) -> Tensor:
            _, weight, _ = self.gate(x)
            rows = x.flatten(0, -2).repeat_interleave(self.num_activated_experts, dim=0)
            routed = torch.empty_like(rows).copy_(self.experts[0](rows.clone()))  # gathered and scattered by each
            routed = (routed.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(1)
            return routed.view_as(x).to(x.dtype) + self.shared_experts(x)

        for module in denoiser.modules():
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.forward = types.MethodType(forward, module)
        patchify, patch = denoiser.patchify, denoiser.config.patch_size

        def patchify_with_known_sizes(states: Tensor) -> tuple[Any, ...]:
            tokens, masks, _, ids = patchify(states)
            return tokens, masks, [(states.shape[-2] // patch, states.shape[-1] // patch)] * len(states), ids

        denoiser.patchify = patchify_with_known_sizes
        return "its routed experts are counted by an upper bound"

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by T5, text (B, L, C), every layer of Llama, (B, K, L, C), and both CLIPs, pooled (B, P)."""
        text, _, layers, _, pooled, _ = self.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return Embeddings(text, pooled, layers=layers.transpose(0, 1))

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """`mu` of the largest image, whatever the size."""
        dynamic = self.scheduler.config.get("use_dynamic_shifting", False)
        return {"mu": calculate_shift(self.transformer.max_seq)} if dynamic else {}

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v: the model's output is -v."""
        for module in model.modules():  # for good: gradient checkpointing runs them again in the backward pass
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.training = True
        return -model(
            hidden_states=x,
            timesteps=timestep,
            encoder_hidden_states_t5=embeddings.text,
            encoder_hidden_states_llama3=embeddings.layers.transpose(0, 1),
            pooled_embeds=embeddings.pooled,
            return_dict=False,
        )[0]

    def default_size(self) -> tuple[int, int]:
        """Return the model's own size: the stock pipeline draws at its area alone."""
        own = self.default_sample_size * self.vae_scale_factor
        return own, own

    def check_size(self, height: int, width: int) -> None:
        """As in all families, and a size that the stock pipeline leaves as it is: it scales others to its area."""
        super().check_size(height, width)
        kept = self._stock_size(height, width)
        while kept != self._stock_size(*kept):
            kept = self._stock_size(*kept)
        if kept != (height, width):
            raise ValueError(
                f"HiDreamImagePipeline wouldn't draw {height} x {width}, as it scales every size to the area of its "
                f"own, so that what is trained couldn't be sampled; use {kept[0]} x {kept[1]}"
            )

    def _stock_size(self, height: int, width: int) -> tuple[int, int]:
        scale = math.sqrt(self.default_size()[0] ** 2 / (height * width))
        return tuple(int(size * scale // self.size_multiple * self.size_multiple) for size in (height, width))
