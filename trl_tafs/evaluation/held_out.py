"""Evaluation during training, on held-out prompts with held-out rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trl_tafs.evaluation.drawing import Drawer, DrawSpec, draw_and_score
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.processes import any_process, gather_rows, raise_everywhere
from trl_tafs.prompts.source import row_to_prompt
from trl_tafs.rewards.scoring import RewardError, RewardSet


class Evaluator:
    """Held-out prompts and rewards, drawn and scored by all processes together.

    Args:
        prompts: a sequence or dataset of prompts.
        rewards: that score the images.
        images_per_prompt: images of each prompt.

    Raises:
        ValueError: there are no prompts.
    """

    def __init__(self, prompts: Any, rewards: RewardSet, images_per_prompt: int = 1) -> None:
        pairs = [row_to_prompt(prompts[i]) for i in range(len(prompts))]
        if not pairs:
            raise ValueError("eval_prompts is empty; give at least one held-out prompt")
        self.items = [pair for pair in pairs for _ in range(images_per_prompt)]
        self.rewards = rewards

    @classmethod
    def of(cls, config: Any, prompts: Any | None, rewards: RewardSet) -> Evaluator | None:
        """Make the evaluator that a training configuration asks for; None without prompts.

        Raises:
            ValueError: `eval_freq` asks for evaluations, and there are no prompts.
        """
        if prompts is not None:
            return cls(prompts, rewards, config.eval_images_per_prompt)
        if config.eval_freq:
            raise ValueError(f"eval_freq is {config.eval_freq}, and there are no eval_prompts to evaluate on")
        return None

    def __call__(self, drawer: Drawer, specs: Sequence[DrawSpec], accelerator: Any) -> dict[str, float]:
        """Return `eval/<sampler>_<steps>/<reward>` of each way of drawing: the mean over all images with a score.

        Raises:
            RewardError: a reward failed on any process; raised on all of them.
            NonFiniteError: the denoiser or the VAE made NaN or infinity on any process; raised on all of them.
        """
        world, rank = accelerator.num_processes, accelerator.process_index
        share = -(-len(self.items) // world)
        mine = [i % len(self.items) for i in range(rank * share, (rank + 1) * share)]  # padded: equal work everywhere
        items, results = [self.items[i] for i in mine], {}
        fault: Exception | None = None
        for spec in specs:
            try:
                values = draw_and_score(drawer, spec, self.rewards, items, mine)[1][:, 0]
            except (
                RewardError,
                NonFiniteError,
            ) as error:  # the other processes wait in the gather: fail together, below
                fault = fault or error
                values = torch.full((len(mine), len(self.rewards.names)), torch.nan, dtype=torch.float64)
            everyone = gather_rows(accelerator, values)[: len(self.items)]
            for name, mean in zip(self.rewards.names, everyone.nanmean(dim=0).tolist(), strict=True):
                results[f"eval/{spec.sampler}_{spec.num_steps}/{name}"] = mean
        if any_process(accelerator, fault is not None):
            raise_everywhere(accelerator, fault, NonFiniteError, "evaluation")
            raise_everywhere(accelerator, fault, RewardError, "evaluation")
        return results
