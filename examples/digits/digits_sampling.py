"""Sampling the digits pipeline in ten lines a sampler: annealed or ODE, with or without guidance.

Convention: x_s = (1 - s) x_0 + s eps, the transformer predicts v = eps - x_0 and is told 1000 s.
"""

import torch
from diffusers import StableDiffusion3Pipeline
from digits_components import MAX_LENGTH
from digits_data import prompt_for
from torch import Tensor

Text = tuple[Tensor, Tensor]  # (B, L, D) tokens and (B, D) pooled


def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> Text:
    """The three text encoders' tokens (B, 2 * MAX_LENGTH, D) and the pooled embedding (B, D)."""
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH
    )
    return tokens, pooled


def encode_images(pipeline: StableDiffusion3Pipeline, images: Tensor) -> Tensor:
    """Images in [0, 1] -> latents as the transformer sees them, the mean of the VAE's posterior."""
    config = pipeline.vae.config
    mean = pipeline.vae.encode(2 * images - 1).latent_dist.mode()
    return (mean - config.shift_factor) * config.scaling_factor


def decode_latents(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> Tensor:
    """Latents -> images (B, 3, H, W) float32 in [0, 1]."""
    config = pipeline.vae.config
    images = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).float()


def velocity(transformer, x: Tensor, s: Tensor, text: Text) -> Tensor:
    """v(x, s, c); s is (B,)."""
    return transformer(
        hidden_states=x, encoder_hidden_states=text[0], pooled_projections=text[1], timestep=1000 * s
    ).sample


@torch.no_grad()
def sample(
    pipeline: StableDiffusion3Pipeline,
    labels: Tensor,
    *,
    steps: int = 4,
    sampler: str = "annealed",
    guidance: float = 1.0,
    seed: int = 0,
    template: int = 0,
) -> Tensor:
    """An image for each label, (B, 3, 8, 8) in [0, 1]; by "annealed" (clean, re-noise) or "ode" (Euler)."""
    if sampler not in ("annealed", "ode"):
        raise ValueError(f"sampler is 'annealed' or 'ode', not {sampler!r}")
    tokens, pooled = encode_prompts(pipeline, [prompt_for(d, template) for d in range(10)] + [""])
    text = tokens[labels], pooled[labels]
    empty = torch.full_like(labels, 10)
    no_text = tokens[empty], pooled[empty]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), 1, 8, 8)
    x = torch.randn(shape, generator=generator)
    levels = torch.linspace(1, 1 / steps, steps).tolist() + [0.0]
    for s, following in zip(levels, levels[1:], strict=False):
        level = torch.full((len(labels),), s)
        v = velocity(pipeline.transformer, x, level, text)
        if guidance != 1.0:
            base = velocity(pipeline.transformer, x, level, no_text)
            v = base + guidance * (v - base)
        if sampler == "ode":
            x = x + (following - s) * v
        else:
            noise = torch.randn(shape, generator=generator) if following else 0.0
            x = (1 - following) * (x - s * v) + following * noise
    return decode_latents(pipeline, x)
