"""What every family shares: levels, guidance, annealed rollout and the log-probability of a transition.

A family is a subclass of its diffusers pipeline with `TAFSPipelineMixin` in front. It states `lora_target_modules`
and two methods, `embed` and `denoise`, and overrides what differs in it. It repeats no equation.

A latent has the memory layout that the stock pipeline's scheduler sees, so that one seed draws the same noise: where
that packs patches into tokens (B, L, C), a latent here is (B, rows, columns, C), which is the same memory and keeps
the image's shape.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from trl_tafs.method.guidance import is_guided
from trl_tafs.method.kernels import Annealed, Kernel
from trl_tafs.method.levels import LEVELS, level_to_timestep, scheduler_levels, uniform_levels
from trl_tafs.method.noise import Noise, SequentialNoise
from trl_tafs.method.rollout import replay, rollout
from trl_tafs.method.types import Conditioning, Embeddings, Rollout, Transitions
from trl_tafs.pipelines.components import base_dtype, denoiser_of, is_text_encoder
from trl_tafs.pipelines.pictures import check_pictures, like, pictures_of
from trl_tafs.pipelines.schedulers import AnnealedFlowMatchScheduler, flow_match_config


class TAFSPipelineMixin(ABC):
    """Annealed rollout and log-probability hooks over a diffusers flow-matching pipeline."""

    denoiser_name = "transformer"
    lora_target_modules: tuple[str, ...]
    max_paper_resolution = 512
    # The halves of classifier-free guidance in one batch, as the stock pipeline orders them; None: two evaluations.
    guidance_batch: tuple[str, str] | None = ("negative", "positive")
    guidance_argument = "guidance_scale"  # what the stock `__call__` calls the scale of classifier-free guidance
    # The states' dtype; None: the denoiser's. Some stock pipelines keep float32 around a bfloat16 denoiser.
    latent_dtype: torch.dtype | None = None
    # Cached prompts of different lengths are padded to multiples of this, so that a row's result hardly depends on the
    # other rows of its batch; None: the family pads by itself.
    text_multiple: int | None = None
    # The scale that a guidance-distilled denoiser is given where none is asked for; None: it takes none.
    default_embedded_guidance: float | None = None
    counting_tokenizers: tuple[str, ...] = ("tokenizer",)  # those whose tokens `max_sequence_length` limits
    uncounted_tokens = 0  # of the template that a prompt is put into, those that it leaves out of the count
    stock_sequence_limit: int | None = None  # tokens of a prompt that the stock pipeline takes at most; None: any
    max_pictures = 0  # source pictures that a prompt may carry
    needs_pictures = False  # whether it must
    comfyui_shift: float | None = None  # of this family's levels in ComfyUI; None: it isn't known to load its LoRAs
    card_tags: tuple[str, ...] = ()  # the Hub's tags of this family on an adapter's card
    # Parts of a LoRA's keys that this family has and few others have, and what such a LoRA is called in an error.
    lora_key_marks: tuple[str, ...] = ()
    lora_family = "this family"
    # Whether the stock pipeline hands its generator to the scheduler, so that the annealed sampler's noise follows it.
    renoises_from_generator = False
    base_revision: str | None = None  # the branch, tag or commit that `from_pretrained` was asked for

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As the parent's; the revision asked for is kept in `base_revision`."""
        pipeline = super().from_pretrained(*args, **options)
        pipeline.base_revision = options.get("revision")
        return pipeline

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained, out of `torch.compile`'s wrapper."""
        return denoiser_of(self)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders that are loaded, by their components' names."""
        return {n: module for n, module in self.components.items() if is_text_encoder(n) and module is not None}

    def missing_text_encoders(self) -> list[str]:
        """Return the names of the text encoders that the pipeline was loaded without."""
        return [name for name, module in self.components.items() if is_text_encoder(name) and module is None]

    # What a family provides -----------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, prompts: list[str], max_sequence_length: int, negative: bool = False) -> Embeddings:
        """Encode B prompts, as the stock pipeline encodes a batch of them; `negative` ones, where that differs."""

    @abstractmethod
    def denoise(self, model: nn.Module, x: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """One evaluation of `model`: x (B, *), timestep (B,) in diffusers' units, to a velocity (B, *)."""

    # What a family changes where it differs -------------------------------------------------------------------

    @property
    def lora_excluded_modules(self) -> list[str]:
        """Those of the target modules that have no effect, and would leave DDP waiting for their gradient."""
        return []

    @property
    def dead_lora_modules(self) -> list[str]:
        """Parts of the names of modules whose output never reaches the velocity: their LoRA can't have a gradient."""
        return []

    def few_step_sign(self) -> str | None:
        """Return what, but for names, says that the model draws in few steps already; None if nothing does."""
        return None

    def embedding_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one prompt's `Embeddings`, by field, at `length` tokens; the memory plan's.

        The default reads the denoiser's configuration: text (L, C), and pooled (P,) where it takes one.
        """
        config = self.denoiser.config
        names = ("joint_attention_dim", "caption_channels", "cap_feat_dim", "cross_attention_dim", "text_embed_dim")
        channels = next(config[name] for name in names if config.get(name))
        pooled = config.get("pooled_projection_dim")
        return {"text": (length, channels)} | ({"pooled": (pooled,)} if pooled else {})

    def stand_in_for_values(self, denoiser: nn.Module) -> str | None:
        """Replace in a copy of the denoiser what depends on values, by what holds at least as many bytes.

        Returns:
            What the memory plan says of it; None where nothing does.
        """
        return None

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one image's latent: (C, H / f, W / f), f the VAE's factor."""
        channels = self.denoiser.config.in_channels
        return channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, *) in the VAE's dtype as its decoder takes them."""
        shift = self.vae.config.get("shift_factor")
        latents = latents / self.vae.config.scaling_factor
        return latents if shift is None else latents + shift

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W), float32 in [0, 1]."""
        return self.pixels(self.vae.decode(self.vae_latents(latents.to(self.vae.dtype)), return_dict=False)[0])

    def pixels(self, decoded: Tensor) -> Tensor:
        """What the VAE decoded, (B, 3, H, W), to images, float32 in [0, 1]; infinity to NaN, which clamping keeps."""
        decoded = decoded.masked_fill(decoded.isinf(), float("nan"))
        return self.image_processor.postprocess(decoded, output_type="pt").float()

    def decode_in_batches(self, latents: Tensor, batch_size: int) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W) on the CPU, `batch_size` at a time."""
        return torch.cat([self.decode_latents(chunk).cpu() for chunk in latents.split(batch_size)])

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: `u + w (c - u)`, which is off at w = 1."""
        return unconditional + scale * (conditional - unconditional)

    def embed_pictures(self, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Encode the source pictures of B prompts, RGB images of PIL, as the stock pipeline does.

        Returns:
            Their tokens (B, P, C), and (rows, columns) of each of a prompt's.
        """
        raise NotImplementedError(f"{type(self).__name__} says max_pictures, and no embed_pictures")

    def size_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Return what else the stock `__call__` must be told to draw at a size, beside `height` and `width`."""
        return {}

    @property
    def has_guidance(self) -> bool:
        """Whether the stock pipeline has classifier-free guidance: without it, what was trained couldn't be sampled."""
        return True

    def guidance_arguments(self, guidance_scale: float = 1.0, negative_prompt: str | None = None) -> dict[str, Any]:
        """Return the stock `__call__`'s arguments for classifier-free guidance of `guidance_scale` (1: off)."""
        negative = {"negative_prompt": negative_prompt or ""} if is_guided(guidance_scale) else {}
        return {self.guidance_argument: float(guidance_scale)} | negative

    def call_arguments(
        self,
        num_steps: int,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        embedded_guidance_scale: float | None = None,
        levels: str = "uniform",
    ) -> dict[str, Any]:
        """The stock `__call__`'s arguments that sample as a rollout does: steps, levels before the shift, guidance."""
        arguments = {"num_inference_steps": num_steps, "sigmas": self.unshifted_levels(num_steps, levels).tolist()}
        arguments |= self.guidance_arguments(guidance_scale, negative_prompt)
        if self.embedded_guidance(embedded_guidance_scale) is not None:
            arguments["guidance_scale"] = self.embedded_guidance(embedded_guidance_scale)
        return arguments

    # What all share -------------------------------------------------------------------------------------------

    def default_size(self) -> tuple[int, int]:
        """Height and width where none is given: the paper's 512 px, or the model's own where that is smaller."""
        sample_size = getattr(self, "default_sample_size", None) or getattr(self.denoiser.config, "sample_size", None)
        own = (sample_size or 128) * self.vae_scale_factor
        return min(own, self.max_paper_resolution), min(own, self.max_paper_resolution)

    def default_max_sequence_length(self) -> int:
        """Tokens of a prompt where none are given."""
        return self.stock_max_sequence_length()

    def stock_max_sequence_length(self) -> int:
        """Tokens of a prompt in the stock pipeline where none are given."""
        return inspect.signature(self.stock_class().__call__).parameters["max_sequence_length"].default

    def templated(self, prompt: str) -> str:
        """Return what the tokenizer is given of a prompt: within a chat's template, where the family has one."""
        return prompt

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the tokens of each prompt as `max_sequence_length` counts them, before any are cut off.

        Of several tokenizers the one that makes most of it counts; without tokenizers it is 0.
        """
        counts = [0] * len(prompts)
        for tokenizer in (getattr(self, name, None) for name in self.counting_tokenizers):
            if tokenizer is not None and prompts:
                tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
                encoded = tokenizer([self.templated(prompt) for prompt in prompts], verbose=False).input_ids
                found = (len(ids) - self.uncounted_tokens for ids in encoded)
                counts = [max(pair) for pair in zip(counts, found, strict=True)]
        return counts

    def check_sequence_length(self, max_sequence_length: int | None) -> None:
        """Raise ValueError if the stock pipeline doesn't take so many tokens of a prompt; None, the default, fits."""
        limit = self.stock_sequence_limit
        if limit is not None and max_sequence_length is not None and max_sequence_length > limit:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}, and {self.stock_class().__name__} takes {limit} tokens "
                f"at most, so that what is trained couldn't be sampled; use {limit} or less"
            )

    def embedded_guidance(self, scale: float | None = None) -> float | None:
        """Return the scale that the denoiser is given as an input, the family's default if None; None: it takes none.

        Raises:
            ValueError: a scale for a denoiser that takes none.
        """
        takes_one = self.default_embedded_guidance is not None and self.denoiser.config.get("guidance_embeds", True)
        if scale is not None and not takes_one:
            raise ValueError(
                f"embedded_guidance_scale is {scale}, and this {type(self.denoiser).__name__} takes no guidance as an "
                "input; leave it at None, and use guidance_scale for classifier-free guidance"
            )
        return None if not takes_one else float(self.default_embedded_guidance if scale is None else scale)

    encoding_device: torch.device | None = None  # where the text encoders are while they encode, if that isn't all's

    @property
    def _execution_device(self) -> torch.device:
        return self.encoding_device or super()._execution_device

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise ValueError if `guidance_scale` asks for classifier-free guidance and the stock pipeline has none."""
        if is_guided(guidance_scale) and not self.has_guidance:
            raise ValueError(
                f"guidance_scale is {guidance_scale}, and {self.stock_class().__name__} has no classifier-free "
                "guidance for this model, so that what is trained couldn't be sampled; use guidance_scale=1"
            )

    @torch.no_grad()
    def encode_conditioning(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
        embedded_guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
    ) -> Conditioning:
        """Encode all that the denoiser is told of B prompts.

        Args:
            prompts: B of them; one that is a `PicturedPrompt` has source pictures.
            negative_prompts: one for all or one each, where guidance is on; the empty one if None.
            guidance_scale: of classifier-free guidance, which is on above 1.
            embedded_guidance_scale: what a guidance-distilled denoiser takes as an input; None: the family's default.
            max_sequence_length: tokens of a prompt; None for the stock pipeline's default.
        """
        length = max_sequence_length or self.default_max_sequence_length()
        self.check_sequence_length(length)
        self.check_guidance(guidance_scale)
        scale = self.embedded_guidance(embedded_guidance_scale)
        pictures = [pictures_of(prompt) for prompt in prompts]
        for prompt, several in zip(prompts, pictures, strict=True):
            check_pictures(self, several, f"the prompt {prompt!r:.80}")
        positive, negative = self.embed(list(prompts), length), None
        if is_guided(guidance_scale):
            one_for_all = negative_prompts is None or isinstance(negative_prompts, str)
            texts = [negative_prompts or ""] * len(prompts) if one_for_all else list(negative_prompts)
            texts = [like(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
            negative = self.embed(texts, length, negative=True)
        if any(pictures):
            tokens, grids = self.embed_pictures([[picture.image() for picture in several] for several in pictures])
            seen = {"pictures": tokens.to(positive.text.device), "picture_grids": grids}
            positive = dataclasses.replace(positive, **seen)
            negative = None if negative is None else dataclasses.replace(negative, **seen)
        if scale is not None:
            guidance = torch.full((len(prompts),), scale, device=positive.text.device)
            positive = dataclasses.replace(positive, guidance=guidance)
            negative = None if negative is None else dataclasses.replace(negative, guidance=guidance)
        return Conditioning(positive, negative, float(guidance_scale))

    def schedule_shift_kwargs(self, height: int, width: int, num_steps: int) -> dict[str, float]:
        """Return what `scheduler.set_timesteps` needs beside the sigmas: `mu` where the shift is dynamic."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return {}
        bounds = [config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
        return {"mu": calculate_shift(self.image_tokens(height, width), *bounds)}

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of one image in the denoiser, by which a dynamic shift goes."""
        return (height // self.size_multiple) * (width // self.size_multiple)

    def annealed_scheduler(self) -> Any:
        """Return the scheduler with which the stock pipeline anneals, for an adapter's users."""
        return FlowMatchEulerDiscreteScheduler.from_config(flow_match_config(self.scheduler), stochastic_sampling=True)

    def euler_scheduler(self) -> Any:
        """The scheduler with which the stock pipeline solves the ODE, for users of an adapter of another sampler."""
        return FlowMatchEulerDiscreteScheduler.from_config(flow_match_config(self.scheduler), stochastic_sampling=False)

    def unshifted_levels(self, num_steps: int, levels: str = "uniform") -> Tensor:
        """(N,) float32, what the stock `__call__` is given as `sigmas`, before the shift.

        Args:
            num_steps: N.
            levels: "uniform", `linspace(1, 1/N, N)`, the paper's; "scheduler", what the family's scheduler divides
                evenly by itself, `set_timesteps(N)`, down to its least timestep.
        """
        if levels == "uniform":
            return uniform_levels(num_steps)
        if levels not in LEVELS:
            raise ValueError(f"the levels are to be {levels!r}; use {' or '.join(LEVELS)}")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(flow_match_config(self.scheduler))
        return scheduler_levels(num_steps, scheduler.sigma_min)

    def rollout_levels(self, num_steps: int, height: int, width: int, levels: str = "uniform") -> Tensor:
        """(N + 1,) float32: `unshifted_levels(N, levels)` shifted as this pipeline's scheduler shifts, and 0.

        These are exactly the levels at which stock diffusers samples with `annealed_scheduler()` or
        `euler_scheduler()` when it is given `sigmas=unshifted_levels(N, levels)`. The pipeline's own scheduler isn't
        touched.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(flow_match_config(self.scheduler))
        extra = self.schedule_shift_kwargs(height, width, num_steps)
        scheduler.set_timesteps(sigmas=self.unshifted_levels(num_steps, levels).tolist(), **extra)
        return scheduler.sigmas.clone()

    def velocity(self, x: Tensor, level: Tensor, conditioning: Conditioning, model: nn.Module | None = None) -> Tensor:
        """Return the guided velocity, (B, *) float32, of the state x (B, *) at level (B,).

        With classifier-free guidance both halves go through the denoiser as the stock pipeline has them: as one batch,
        or one after the other. `model` is the denoiser to call where it isn't the pipeline's own (a DDP wrapper of it).
        """
        model = getattr(self, self.denoiser_name) if model is None else model
        timestep = level_to_timestep(level, self.scheduler.config.num_train_timesteps)
        if conditioning.negative is None:
            return self.denoise(model, x, timestep, conditioning.positive).float()
        if self.guidance_batch is None:
            conditional = self.denoise(model, x, timestep, conditioning.positive)
            unconditional = self.denoise(model, x, timestep, conditioning.negative)
        else:
            both = Embeddings.cat([getattr(conditioning, half) for half in self.guidance_batch])
            output = self.denoise(model, torch.cat([x, x]), torch.cat([timestep, timestep]), both)
            halves = dict(zip(self.guidance_batch, output.chunk(2), strict=True))
            conditional, unconditional = halves["positive"], halves["negative"]
        return self.guide(conditional, unconditional, conditioning.guidance_scale).float()

    @torch.no_grad()
    def annealed_rollout(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        conditioning: Conditioning | None = None,
        num_inference_steps: int = 4,
        levels: str = "uniform",
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        embedded_guidance_scale: float | None = None,
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
            levels: of the steps, see `unshifted_levels`.
            height: pixels; by default `default_size()`.
            width: pixels.
            guidance_scale: above 1 with classifier-free guidance, where `prompt` is given.
            embedded_guidance_scale: what a guidance-distilled denoiser is given; None for the family's default.
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
                embedded_guidance_scale=embedded_guidance_scale,
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
            self.rollout_levels(num_inference_steps, height, width, levels).to(device),
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
    def model_dtype(self) -> torch.dtype:
        """The dtype in which the denoiser computes: that of its base weights, whatever the LoRA's."""
        return base_dtype(self.denoiser)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of states and actions."""
        return self.latent_dtype or self.model_dtype

    @property
    def size_multiple(self) -> int:
        """Of what height and width must be multiples, in pixels."""
        return self.vae_scale_factor * getattr(self, "patch_size", 1)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming a size that fits, if height or width don't divide into patches."""
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            near = [max(multiple, round(size / multiple) * multiple) for size in (height, width)]
            raise ValueError(
                f"height and width must be multiples of {multiple}, got {height} x {width}; use {near[0]} x {near[1]}"
            )

    def __call__(self, *args: Any, annealed: bool = False, **kwargs: Any) -> Any:
        """As the parent's `__call__`; with `annealed=True` by the annealed sampler.

        Then the levels are `linspace(1, 1/N, N)` unless `sigmas` are given, N is 4 and classifier-free guidance is off
        unless said otherwise, and the re-noising is drawn from `generator`. The pipeline's own scheduler is left as it
        was.
        """
        if not annealed:
            return super().__call__(*args, **kwargs)
        given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        levels = given.get("sigmas")
        defaults = self.call_arguments(given.get("num_inference_steps", 4) if levels is None else len(levels))
        given = defaults | {name: value for name, value in given.items() if name != "sigmas" or value is not None}
        given["num_inference_steps"] = defaults["num_inference_steps"]
        scheduler = self.scheduler
        self.scheduler = self.seeded_scheduler(given.get("generator"))
        try:
            return super().__call__(**given)
        finally:
            self.scheduler = scheduler

    def seeded_scheduler(self, generator: torch.Generator | list[torch.Generator] | None) -> Any:
        """Return the annealed sampler whose re-noising is drawn from `generator`."""
        return AnnealedFlowMatchScheduler.from_scheduler(self.scheduler, generator)

    def to_json_string(self) -> str:
        """The saved `model_index.json` names the diffusers class, so that plain diffusers loads the folder."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = self.stock_class().__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def stock_class(cls) -> type:
        """Return the diffusers pipeline that this one extends."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
