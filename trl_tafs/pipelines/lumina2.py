"""Lumina-Image 2.0."""

from __future__ import annotations

import torch
from diffusers import Lumina2Pipeline
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


class TAFSLumina2Pipeline(TAFSPipelineMixin, Lumina2Pipeline):
    """`Lumina2Pipeline` with annealed rollout and log-probability hooks.

    `max_sequence_length` counts the system prompt too, which stands before each prompt but not before a negative one.
    """

    lora_target_modules = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v")
    guidance_batch = None
    patch_size = 2
    stock_sequence_limit = 512
    card_tags = ("lumina2", "lumina2-diffusers")
    lora_key_marks, lora_family = ("noise_refiner.0.attn.",), "Lumina2"

    def templated(self, prompt: str) -> str:
        """Below the system prompt, as the stock pipeline has it."""
        return f"{self.system_prompt} <Prompt Start> {prompt}"

    def check_sequence_length(self, max_sequence_length: int | None) -> None:
        """As in all families; and raise ValueError if the system prompt alone is as long."""
        super().check_sequence_length(max_sequence_length)
        system = self.prompt_tokens([""])[0]
        if max_sequence_length is not None and 0 < max_sequence_length <= system:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}, and Lumina2Pipeline's system prompt alone has {system} "
                "tokens, so that nothing of a prompt would be left; use more, the default is 256"
            )

    def embedding_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """With a mask, (L,)."""
        return super().embedding_shapes(length) | {"mask": (length,)}

    def stand_in_for_values(self, denoiser: nn.Module) -> str | None:
        """Take every prompt as long as its mask."""
        embedder = denoiser.rope_embedder
        embed = embedder.forward
        embedder.forward = lambda hidden_states, mask: embed(hidden_states, _Full(mask.shape))
        return None

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Gemma 2: text (B, L, C) and its mask."""
        texts = prompts if negative else [self.templated(prompt) for prompt in prompts]
        text, mask = self._get_gemma_prompt_embeds(texts, max_sequence_length=max_sequence_length)
        return Embeddings(text, mask=mask)

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """`mu` from the latent's channels, which the stock pipeline takes for the number of tokens."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return {}
        bounds = [config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
        return {"mu": calculate_shift(self.transformer.config.in_channels, *bounds)}

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of each row's direction; its norm stays the conditional one's."""
        guided = super().guide(conditional, unconditional, scale)
        norms = (torch.norm(v, dim=-1, keepdim=True) for v in (conditional, guided))
        return guided * (next(norms) / next(norms))

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v: the model's time runs from 0 to 1, and its output is -v."""
        return -model(
            hidden_states=x,
            timestep=1 - timestep / 1000,
            encoder_hidden_states=embeddings.text,
            encoder_attention_mask=embeddings.mask,
            return_dict=False,
        )[0]


class _Full:
    """What the position embedding asks of a mask that leaves no token out."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def sum(self, dim: int) -> _Full:
        return self

    def tolist(self) -> list[int]:
        return [self.shape[1]] * self.shape[0]
