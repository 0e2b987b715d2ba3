"""AuraFlow."""

from __future__ import annotations

from diffusers import AuraFlowPipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


class TAFSAuraFlowPipeline(TAFSPipelineMixin, AuraFlowPipeline):
    """`AuraFlowPipeline` with annealed rollout and log-probability hooks."""

    lora_target_modules = (
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    patch_size = 2
    card_tags = ("aura_flow", "aura_flow-diffusers")
    lora_key_marks, lora_family = ("joint_transformer_blocks.0.attn.",), "AuraFlow"

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by UMT5: text (B, L, C), zero where a prompt is padded."""
        text, *_ = self.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return Embeddings(text)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v."""
        return model(
            x,
            encoder_hidden_states=embeddings.text,
            timestep=(timestep / 1000).to(x.dtype),
            return_dict=False,
        )[0]
