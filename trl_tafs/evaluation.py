"""Evaluation on held-out prompts with held-out rewards: fixed noise, several step counts, both samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.checkpoint import any_process
from trl_tafs.kernels import Annealed, Kernel, Ode
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.prompts import row_to_prompt
from trl_tafs.rewards.scoring import RewardError, RewardSet
from trl_tafs.rollout import SampleNoise, Velocity, sample_steps
from trl_tafs.types import Conditioning

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


class Evaluator:
    """Held-out prompts and rewards, and how to run them on all processes together.

    Args:
        prompts: a sequence or dataset of prompts.
        rewards: the judges.
        images_per_prompt: images of each prompt.
    """

    def __init__(self, prompts: Any, rewards: RewardSet, images_per_prompt: int = 1) -> None:
        pairs = [row_to_prompt(prompts[i]) for i in range(len(prompts))]
        if not pairs:
            raise ValueError("eval_prompts is empty; give at least one held-out prompt")
        self.items = [pair for pair in pairs for _ in range(images_per_prompt)]
        self.rewards = rewards

    def __call__(
        self,
        pipeline: TAFSPipelineMixin,
        accelerator: Any,
        encode: Encode,
        velocity: Velocity,
        setting: Setting,
        samplers: Sequence[str],
        step_counts: Sequence[int],
    ) -> dict[str, float]:
        """`eval/<sampler>_<steps>/<reward>` for every combination: the means over all images with a verdict."""
        world, rank = accelerator.num_processes, accelerator.process_index
        share = -(-len(self.items) // world)
        mine = [i % len(self.items) for i in range(rank * share, (rank + 1) * share)]  # padded: equal work everywhere
        prompts, metadata = [self.items[i][0] for i in mine], [self.items[i][1] for i in mine]
        results, fault = {}, None
        for sampler in samplers:
            for num_steps in step_counts:
                how = {"sampler": sampler, "num_steps": num_steps, "steps": False}
                drawn = draw_latents(pipeline, encode, velocity, setting, prompts, mine, **how)
                with pipeline.decoding():  # where models take turns, the rewards have the denoiser's place
                    images = decode_drawn(pipeline, setting, drawn)[:, 0]
                    try:
                        values = self.rewards(images, prompts, metadata).values.to(accelerator.device)
                    except RewardError as error:  # the other processes wait in the gather: fail together, below
                        fault = fault or error
                        values = torch.full((len(mine), len(self.rewards.names)), torch.nan, device=accelerator.device)
                everyone = accelerator.gather(values)[: len(self.items)]
                for name, mean in zip(self.rewards.names, everyone.nanmean(dim=0).tolist(), strict=True):
                    results[f"eval/{sampler}_{num_steps}/{name}"] = mean
        if any_process(accelerator, fault is not None):
            raise RewardError(f"evaluation: {fault or 'a reward failed on another process'}") from fault
        return results
