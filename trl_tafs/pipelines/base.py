"""What every family shares: levels, guidance, annealed rollout and the log-probability of a transition.

A family is a subclass of its diffusers pipeline with `TAFSPipelineMixin` in front. It states `lora_target_modules`
and four methods: `encode_conditioning`, `denoise`, `decode_latents`, `latent_shape`. It repeats no equation.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from trl_tafs.kernels import Annealed, Kernel
from trl_tafs.rollout import Noise, replay, rollout
from trl_tafs.schedules import level_to_timestep, uniform_levels
from trl_tafs.types import Conditioning, Embeddings, Rollout, Transitions


class AnnealedFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Diffusers' Euler scheduler with `stochastic_sampling`, whose re-noising honours a generator.

    Most pipelines don't pass their generator on to the scheduler, so that the noise of `stochastic_sampling`
    follows the global seed; this one carries its own.
    """

    generator: torch.Generator | list[torch.Generator] | None = None

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> AnnealedFlowMatchScheduler:
        """The annealed sampler of a pipeline that has `scheduler`, drawing from `generator`."""
        annealed = cls.from_config(scheduler.config, stochastic_sampling=True)
        annealed.generator = generator
        return annealed

    def step(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """As the parent's, with this scheduler's generator where none is passed."""
        return super().step(*args, generator=self.generator if generator is None else generator, **kwargs)


class SequentialNoise:
    """Noise for a single rollout, drawn in the order of use from one generator (None: the global one)."""

    def __init__(self, batch: int, generator: torch.Generator | None, device: torch.device) -> None:
        self.batch, self.generator, self.device = batch, generator, device

    def __call__(self, stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape)."""
        source = "cpu" if self.generator is None else self.generator.device
        draw = torch.randn((self.batch, *shape), generator=self.generator, device=source)
        return draw.to(self.device)


class TAFSPipelineMixin(ABC):
    """Annealed rollout and log-probability hooks over a diffusers flow-matching pipeline."""

    denoiser_name = "transformer"
    lora_target_modules: tuple[str, ...]
    max_paper_resolution = 512

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained."""
        return getattr(self, self.denoiser_name)

    # What a family provides -----------------------------------------------------------------------------------

    @abstractmethod
    def encode_conditioning(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
    ) -> Conditioning:
        """Encode B prompts; with negatives only where guidance is on (`guidance_scale` > 1)."""

    @abstractmethod
    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """One evaluation of `model`: x (B, *), timestep (B,) in diffusers' units, to a velocity (B, *)."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W), float32 in [0, 1]."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one image's latent."""

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """What `scheduler.set_timesteps` needs beside the sigmas: `mu` where the shift is dynamic."""
        return {}

    # What all share -------------------------------------------------------------------------------------------

    def default_size(self) -> tuple[int, int]:
        """Height and width where none is given: the paper's 512 px, or the model's own where that is smaller."""
        own = self.default_sample_size * self.vae_scale_factor
        return min(own, self.max_paper_resolution), min(own, self.max_paper_resolution)

    def rollout_levels(self, num_steps: int, height: int, width: int) -> Tensor:
        """(N + 1,) float32: `linspace(1, 1/N, N)` shifted as this pipeline's scheduler shifts, and 0.

        These are exactly the levels at which stock diffusers samples when it is given
        `sigmas=linspace(1, 1/N, N)`. The pipeline's own scheduler isn't touched.
        """
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"the pipeline's scheduler is a {type(self.scheduler).__name__}, whose shift can't be read here; set "
                "pipeline.scheduler to the FlowMatchEulerDiscreteScheduler that the adapter is to be sampled with"
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        extra = self.schedule_shift_kwargs(height, width, num_steps)
        scheduler.set_timesteps(sigmas=uniform_levels(num_steps).tolist(), **extra)
        return scheduler.sigmas.clone()

    def velocity(self, x: Tensor, level: Tensor, conditioning: Conditioning, model: nn.Module | None = None) -> Tensor:
        """The guided velocity, (B, *) float32, of the state x (B, *) at level (B,).

        With classifier-free guidance both halves go through the denoiser as one batch, as in diffusers.
        `model` is the denoiser to call where it isn't the pipeline's own (a DDP wrapper of it).
        """
        model = self.denoiser if model is None else model
        timestep = level_to_timestep(level, self.scheduler.config.num_train_timesteps)
        if conditioning.negative is None:
            return self.denoise(model, x, timestep, conditioning.positive).float()
        both = Embeddings.cat([conditioning.negative, conditioning.positive])
        output = self.denoise(model, torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        unconditional, conditional = output.chunk(2)
        return (unconditional + conditioning.guidance_scale * (conditional - unconditional)).float()

    @torch.no_grad()
    def annealed_rollout(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        conditioning: Conditioning | None = None,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        kernel: Kernel | None = None,
        reduction: str = "sum",
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
        storage_dtype: torch.dtype | None = None,
        scored_steps: range | None = None,
        model: nn.Module | None = None,
    ) -> Rollout:
        """Sample in `num_inference_steps` and keep latents, actions, clean estimates and log-probabilities.

        Args:
            prompt: B prompts; or
            conditioning: what `encode_conditioning` made of them.
            num_inference_steps: N.
            height: pixels; by default `default_size()`.
            width: pixels.
            guidance_scale: above 1 with classifier-free guidance, where `prompt` is given.
            negative_prompt: with guidance.
            max_sequence_length: tokens of a prompt.
            kernel: `Annealed()` by default.
            reduction: of the log-probabilities, "sum", "mean" or "sqrt".
            latents: (B, *) initial noise; drawn where it isn't given.
            generator: one for the whole rollout; or
            noise: a source of one's own, `noise(stream, step, shape) -> (B, *shape)`.
            storage_dtype: of states and actions, by default that of the denoiser's weights.
            scored_steps: steps, 0-based, whose clean latents are to be scored.
            model: a wrapper of the denoiser to call instead of it.

        Returns:
            A `Rollout`; `decode_latents(rollout.final.to(...))` gives the images.
        """
        if (prompt is None) == (conditioning is None):
            raise ValueError("annealed_rollout takes either a prompt or its conditioning, not both or neither")
        if conditioning is None:
            conditioning = self.encode_conditioning(
                [prompt] if isinstance(prompt, str) else list(prompt),
                negative_prompts=negative_prompt,
                guidance_scale=guidance_scale,
                max_sequence_length=max_sequence_length,
            )
        default_height, default_width = self.default_size()
        height, width = height or default_height, width or default_width
        device = conditioning.positive.text.device
        noise = noise or SequentialNoise(len(conditioning), generator, device)
        if latents is None:
            latents = noise("initial", 0, self.latent_shape(height, width))
        return rollout(
            lambda x, level, c: self.velocity(x, level, c, model),
            kernel or Annealed(),
            conditioning,
            self.rollout_levels(num_inference_steps, height, width).to(device),
            latents,
            noise,
            storage_dtype=storage_dtype or self.storage_dtype,
            reduction=reduction,
            scored_steps=scored_steps,
        )

    def log_prob(
        self,
        rows: Transitions,
        conditioning: Conditioning,
        *,
        kernel: Kernel | None = None,
        reduction: str = "sum",
        model: nn.Module | None = None,
    ) -> Tensor:
        """Replay T stored transitions: the present policy's log-probability of their actions, (T, M), with gradient."""
        transition = replay(
            lambda x, level, c: self.velocity(x, level, c, model), kernel or Annealed(), rows, conditioning
        )
        return transition.log_prob(rows.action, reduction)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which the denoiser takes its input: that of its base weights, whatever the LoRA's."""
        names = ((name, p) for name, p in self.denoiser.named_parameters() if "lora_" not in name)
        return next(p.dtype for _, p in names if p.dtype.is_floating_point)

    def check_size(self, height: int, width: int) -> None:
        """An error that names sizes that fit, where these don't divide into patches."""
        multiple = self.vae_scale_factor * getattr(self, "patch_size", 1)
        if height % multiple or width % multiple:
            near = [max(multiple, round(size / multiple) * multiple) for size in (height, width)]
            raise ValueError(
                f"height and width must be multiples of {multiple}, got {height} x {width}; use {near[0]} x {near[1]}"
            )

    def __call__(self, *args: Any, annealed: bool = False, **kwargs: Any) -> Any:
        """As the parent's `__call__`; with `annealed=True` by the annealed sampler.

        Then the levels are `linspace(1, 1/N, N)` unless `sigmas` are given, N is 4 and guidance is off unless said
        otherwise, and the re-noising is drawn from `generator`. The pipeline's own scheduler is left as it was.
        """
        if not annealed:
            return super().__call__(*args, **kwargs)
        given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        if given.get("sigmas") is None:
            num_steps = given.setdefault("num_inference_steps", 4)
            given["sigmas"] = uniform_levels(num_steps).tolist()
        given["num_inference_steps"] = len(given["sigmas"])
        given.setdefault("guidance_scale", 1.0)
        scheduler = self.scheduler
        self.scheduler = AnnealedFlowMatchScheduler.from_scheduler(scheduler, given.get("generator"))
        try:
            return super().__call__(**given)
        finally:
            self.scheduler = scheduler

    def to_json_string(self) -> str:
        """The saved `model_index.json` names the diffusers class, so that plain diffusers loads the folder."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = self.stock_class().__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def stock_class(cls) -> type:
        """The diffusers pipeline that this one extends."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
