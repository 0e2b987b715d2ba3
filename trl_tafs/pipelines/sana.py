"""Sana and Sana 1.5 by rectified flow, and SanaSprint by TrigFlow."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


class SanaMixin(TAFSPipelineMixin):
    """What Sana's pipelines share: Gemma, the deep-compression VAE, float32 states."""

    lora_target_modules = (
        *("attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v"),
        *("attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v"),
    )
    latent_dtype = torch.float32
    card_tags = ("sana", "sana-diffusers")
    lora_key_marks, lora_family = ("attn1.to_",), "Sana or PixArt"
    renoises_from_generator = True
    encoding_options: dict[str, Any] = {}

    def embedding_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """With a mask, (L,)."""
        return super().embedding_shapes(length) | {"mask": (length,)}

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by Gemma: text (B, L, C) and its mask. Only what is wished for is led in by the instruction."""
        instruction = inspect.signature(self.stock_class().__call__).parameters["complex_human_instruction"].default
        text, mask, *_ = self.encode_prompt(
            prompts,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=None if negative else instruction,
            **self.encoding_options,
        )
        return Embeddings(text, mask=mask)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v, float32; a learned sigma is dropped."""
        guidance = {} if embeddings.guidance is None else {"guidance": self.scaled_guidance(embeddings)}
        output = model(
            x.to(self.model_dtype),
            encoder_hidden_states=embeddings.text.to(self.model_dtype),
            encoder_attention_mask=embeddings.mask,
            timestep=self.model_time(timestep),
            return_dict=False,
            **guidance,
        )[0]
        return output.float()[:, : x.shape[1]]

    def model_time(self, timestep: Tensor) -> Tensor:
        """Return the timestep as the denoiser takes it."""
        return timestep * self.transformer.config.timestep_scale

    @property
    def size_multiple(self) -> int:
        """The stock pipelines ask for multiples of 32, whatever the VAE's factor."""
        return math.lcm(32, self.vae_scale_factor)

    def call_arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without binning: it would draw at the model's own size and resize."""
        return super().call_arguments(*args, **kwargs) | {"use_resolution_binning": False}


class TAFSSanaPipeline(SanaMixin, SanaPipeline):
    """`SanaPipeline` with annealed rollout and log-probability hooks; 1.0 and 1.5.

    Checkpoints whose scheduler is a DPM-solver are rolled out by the annealed sampler with its `flow_shift`.
    """

    encoding_options = {"do_classifier_free_guidance": False}


class TAFSSanaSprintPipeline(SanaMixin, SanaSprintPipeline):
    r"""`SanaSprintPipeline` with annealed rollout and log-probability hooks.

    TrigFlow's state at the angle t is `cos(t) x_0 + sin(t) eps`, in units of sigma_data. Divided by `cos(t) + sin(t)`
    it is rectified flow's at the level `s = sin(t) / (cos(t) + sin(t))`, its denoiser's output is the velocity there,
    and its re-noising (`SCMScheduler`) is the annealed kernel. The rollout is the stock one up to float rounding.
    """

    default_embedded_guidance = 4.5
    max_timesteps, intermediate_timesteps = 1.57080, 1.3  # the stock pipeline's, of the first and of the second angle

    def few_step_sign(self) -> str | None:
        """All of them do."""
        return "SanaSprint"

    @property
    def has_guidance(self) -> bool:
        """Its guidance is embedded."""
        return False

    def unshifted_levels(self, num_steps: int, levels: str = "uniform") -> Tensor:
        """Return uniform ones, for the card alone: the stock pipeline's angles are its own.

        Raises:
            ValueError: others are asked for.
        """
        if levels != "uniform":
            raise ValueError(
                f"the levels are to be {levels!r}, and SanaSprintPipeline samples at angles of its own; use 'uniform' "
                "(sample_levels, --levels)"
            )
        return super().unshifted_levels(num_steps, levels)

    def rollout_levels(self, num_steps: int, height: int, width: int, levels: str = "uniform") -> Tensor:
        """(N + 1,) float32: the levels of the stock pipeline's angles. The first lies 4e-6 above 1, as there."""
        self.unshifted_levels(num_steps, levels)
        angles = torch.linspace(self.max_timesteps, 0.0, num_steps + 1)
        if num_steps == 2:
            angles[1] = self.intermediate_timesteps
        return torch.sin(angles) / (torch.cos(angles) + torch.sin(angles))

    def model_time(self, timestep: Tensor) -> Tensor:
        """Return the level."""
        return timestep / self.scheduler.config.num_train_timesteps

    def scaled_guidance(self, embeddings: Embeddings) -> Tensor:
        """Return the guidance in the denoiser's units, (B,)."""
        return embeddings.guidance.to(embeddings.text.dtype) * self.transformer.config.guidance_embeds_scale

    def call_arguments(self, num_steps: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """It takes no sigmas, and a second angle of its own in two steps alone."""
        arguments = super().call_arguments(num_steps, *args, **kwargs)
        middle = self.intermediate_timesteps if num_steps == 2 else None
        return {k: v for k, v in arguments.items() if k != "sigmas"} | {"intermediate_timesteps": middle}

    def guidance_arguments(self, guidance_scale: float = 1.0, negative_prompt: str | None = None) -> dict[str, Any]:
        """None: it has no classifier-free guidance."""
        return {}

    def annealed_scheduler(self) -> Any:
        """Its own: it anneals by itself."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def euler_scheduler(self) -> Any:
        """Its own, the only one that its stock pipeline samples with."""
        return self.annealed_scheduler()

    def seeded_scheduler(self, generator: torch.Generator | list[torch.Generator] | None) -> Any:
        """Its own, to which the stock pipeline hands the generator."""
        return copy.copy(self.scheduler)
