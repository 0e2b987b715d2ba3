"""Sampling the words pipeline in ten lines a sampler: annealed or ODE, with or without guidance.

Convention: x_s = (1 - s) x_0 + s eps, the transformer predicts v = eps - x_0 and is told 1000 s.
"""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from words_data import LAYOUTS, Layout

Text = tuple[Tensor, Tensor]  # (B, L, C) tokens and (B, P) pooled


def layout_of(pipeline: StableDiffusion3Pipeline) -> Layout:
    """The layout of a pipeline's images."""
    return next(layout for layout in LAYOUTS.values() if layout.patch == pipeline.transformer.config.patch_size)


def size_of(pipeline: StableDiffusion3Pipeline) -> tuple[int, int]:
    """Height and width of a pipeline's images: of its layout, or a square."""
    config = pipeline.transformer.config
    sizes = {layout.patch: (layout.height, layout.width) for layout in LAYOUTS.values()}
    return sizes.get(config.patch_size, (config.sample_size, config.sample_size))


def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> Text:
    """The three text encoders' tokens (B, 2 L, C), L of the pipeline's tokenizers, and the pooled embedding (B, P)."""
    length = pipeline.tokenizer.model_max_length
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return tokens, pooled


def encode_images(pipeline: StableDiffusion3Pipeline, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to latents of the same shape, the mean of the VAE's posterior."""
    config = pipeline.vae.config
    return (pipeline.vae.encode(2 * images - 1).latent_dist.mode() - config.shift_factor) * config.scaling_factor


def decode_latents(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> Tensor:
    """Latents to images (B, 3, H, W) float32 in [0, 1]."""
    config = pipeline.vae.config
    images = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).float()


def shifted(pipeline: StableDiffusion3Pipeline, levels: Tensor) -> Tensor:
    """Noise levels as the pipeline's scheduler shifts them."""
    shift = pipeline.scheduler.config.shift
    return shift * levels / (1 + (shift - 1) * levels)


def velocity(transformer: nn.Module, x: Tensor, s: Tensor, text: Text) -> Tensor:
    """v(x, s, c); s is (B,)."""
    return transformer(
        hidden_states=x, encoder_hidden_states=text[0], pooled_projections=text[1], timestep=1000 * s
    ).sample


@torch.no_grad()
def sample(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    *,
    steps: int = 4,
    sampler: str = "annealed",
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """An image for each prompt, (B, 3, H, W) in [0, 1]; by "annealed" (clean, re-noise) or "ode" (Euler)."""
    if sampler not in ("annealed", "ode"):
        raise ValueError(f"sampler is 'annealed' or 'ode', not {sampler!r}")
    generator = torch.Generator().manual_seed(seed)
    chunks = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return torch.cat([_sample(pipeline, chunk, steps, sampler, guidance, generator) for chunk in chunks])


def _sample(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    steps: int,
    sampler: str,
    guidance: float,
    generator: torch.Generator,
) -> Tensor:
    text, no_text = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""] * len(prompts))
    x = torch.randn((len(prompts), 3, *size_of(pipeline)), generator=generator)
    levels = shifted(pipeline, torch.linspace(1, 1 / steps, steps)).tolist() + [0.0]
    for s, following in zip(levels, levels[1:], strict=False):
        level = torch.full((len(prompts),), s)
        v = velocity(pipeline.transformer, x, level, text)
        if guidance != 1.0:
            base = velocity(pipeline.transformer, x, level, no_text)
            v = base + guidance * (v - base)
        if sampler == "ode":
            x = x + (following - s) * v
        else:
            noise = torch.randn(x.shape, generator=generator) if following else 0.0
            x = (1 - following) * (x - s * v) + following * noise
    return decode_latents(pipeline, x)
