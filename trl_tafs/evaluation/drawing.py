"""Draw images for evaluation and cards: fixed noise, any step count, both samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_tafs.method.kernels import Annealed, Kernel, Ode
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import Velocity, sample_steps
from trl_tafs.method.types import Conditioning
from trl_tafs.pipelines.base import TAFSPipelineMixin

SAMPLERS: dict[str, Kernel] = {"annealed": Annealed(), "ode": Ode()}


Encode = Callable[[Sequence[str]], Conditioning]


EVAL_EPOCH = -1  # the key of evaluation's noise: no training epoch has it


@dataclass(frozen=True)
class Setting:
    """How images are drawn for evaluation."""

    height: int
    width: int
    batch_size: int
    seed: int
    storage_dtype: torch.dtype
    device: torch.device
    decode_batch_size: int | None = None  # images that the VAE decodes at once; None: batch_size


def sample_images(
    pipeline: TAFSPipelineMixin,
    encode: Encode,
    velocity: Velocity,
    setting: Setting,
    prompts: Sequence[str],
    sample_ids: Sequence[int],
    *,
    sampler: str = "annealed",
    num_steps: int = 4,
) -> Tensor:
    """Draw one image a prompt, (B, 3, H, W) on the CPU; image i's noise is keyed by `sample_ids[i]`.

    Batches have one shape, the last one padded, so that an image doesn't depend on its neighbours' number.
    """
    return sample_step_images(
        pipeline, encode, velocity, setting, prompts, sample_ids, sampler=sampler, num_steps=num_steps, steps=False
    )[:, 0]


def sample_step_images(
    pipeline: TAFSPipelineMixin,
    encode: Encode,
    velocity: Velocity,
    setting: Setting,
    prompts: Sequence[str],
    sample_ids: Sequence[int],
    *,
    sampler: str = "annealed",
    num_steps: int = 4,
    steps: bool = True,
) -> Tensor:
    """As `sample_images`, with the decoded clean estimate of every step: (B, N, 3, H, W), the result last.

    With `steps=False` the result alone, (B, 1, 3, H, W).
    """
    how = {"sampler": sampler, "num_steps": num_steps, "steps": steps}
    return decode_drawn(
        pipeline, setting, draw_latents(pipeline, encode, velocity, setting, prompts, sample_ids, **how)
    )


@torch.no_grad()
def draw_latents(
    pipeline: TAFSPipelineMixin,
    encode: Encode,
    velocity: Velocity,
    setting: Setting,
    prompts: Sequence[str],
    sample_ids: Sequence[int],
    *,
    sampler: str,
    num_steps: int,
    steps: bool,
) -> list[tuple[list[Tensor], int]]:
    """What `sample_step_images` decodes, batch by batch: each step's latents on the CPU, and how many rows count."""
    device = setting.device
    levels = pipeline.rollout_levels(num_steps, setting.height, setting.width).to(device)
    shape = pipeline.latent_shape(setting.height, setting.width)
    drawn = []
    for start in range(0, len(sample_ids), setting.batch_size):
        rows = list(range(start, min(start + setting.batch_size, len(sample_ids))))
        padded = rows + [rows[-1]] * (setting.batch_size - len(rows))
        noise = SampleNoise(setting.seed, EVAL_EPOCH, tuple(sample_ids[i] for i in padded), device)
        conditioning, latents = encode([prompts[i] for i in padded]), []
        walk = sample_steps(
            velocity,
            SAMPLERS[sampler],
            conditioning,
            levels,
            noise("initial", 0, shape),
            noise,
            setting.storage_dtype,
        )
        for step in walk:
            if step.index == num_steps - 1:
                latents.append(step.next_state.cpu())
            elif steps:
                latents.append(step.clean.cpu())
        drawn.append((latents, len(rows)))
    return drawn


def decode_drawn(pipeline: TAFSPipelineMixin, setting: Setting, drawn: list[tuple[list[Tensor], int]]) -> Tensor:
    """`draw_latents`' images, (B, N, 3, H, W) on the CPU. Where models take turns, it is one exchange."""
    size, images = setting.decode_batch_size or setting.batch_size, []
    with pipeline.decoding():
        for latents, number in drawn:
            decoded = [pipeline.decode_in_batches(latent.to(setting.device), size)[:number] for latent in latents]
            images.append(torch.stack(decoded, dim=1))
    return torch.cat(images)
