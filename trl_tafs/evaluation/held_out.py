"""Evaluation during training, on held-out prompts with held-out rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trl_tafs.evaluation.drawing import Encode, Setting, decode_drawn, draw_latents
from trl_tafs.method.rollout import Velocity
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.processes import any_process
from trl_tafs.prompts.source import row_to_prompt
from trl_tafs.rewards.scoring import RewardError, RewardSet


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
