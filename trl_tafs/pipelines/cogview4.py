"""CogView4."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogView4Pipeline
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor, nn

from trl_tafs.method.types import Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin


class TAFSCogView4Pipeline(TAFSPipelineMixin, CogView4Pipeline):
    """`CogView4Pipeline` with annealed rollout and log-probability hooks.

    The model is told a state's level before the shift, in whole timesteps; the state is at the level after it.
    """

    lora_target_modules = ("attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v")
    guidance_batch = None
    latent_dtype = torch.float32
    patch_size = 2
    card_tags = ("cogview4", "cogview4-diffusers")
    lora_key_marks, lora_family = ("attn1.to_",), "CogView4"

    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """B prompts by GLM: text (B, L, C), L a multiple of 16, padded on the left and without a mask."""
        return Embeddings(self.encode_prompt(prompts, None, False, max_sequence_length=max_sequence_length)[0])

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """`mu` from the square root of the number of tokens."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return {}
        bounds = [config[name] for name in ("base_image_seq_len", "base_shift", "max_shift")]
        return {"mu": calculate_shift(self.image_tokens(height, width), *bounds)}

    def call_arguments(self, num_steps: int, *args: Any, **options: Any) -> dict[str, Any]:
        """As in all families, and the timesteps that the model is told."""
        arguments = super().call_arguments(num_steps, *args, **options)
        return arguments | {"timesteps": [round(1000 * level) for level in arguments["sigmas"]]}

    def _told(self, timestep: Tensor, height: int, width: int) -> Tensor:
        """Timesteps (B,) of shifted levels to those of the levels before the shift, in whole numbers."""
        level = timestep.double() / 1000
        config, shift = self.scheduler.config, self.schedule_shift_kwargs(height, width, 0).get("mu")
        if shift is None:
            shift = self.scheduler.shift
        elif config.get("time_shift_type", "exponential") == "exponential":
            shift = torch.tensor(shift).exp().item()
        return (1000 * level / (shift * (1 - level) + level)).round().to(timestep.dtype)

    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """X (B, C, h, w), timestep (B,) to v."""
        height, width = (side * self.vae_scale_factor for side in x.shape[2:])
        size = embeddings.text.new_tensor([[height, width]]).expand(len(x), 2)
        return model(
            hidden_states=x.to(self.model_dtype),
            encoder_hidden_states=embeddings.text,
            timestep=self._told(timestep, height, width),
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
