"""The methods of DDPOTrainer that its subclasses override."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_tafs.algorithm import Algorithm
from trl_tafs.method.losses import clipped_surrogate
from trl_tafs.method.types import Conditioning, LossOutput
from trl_tafs.policy.policy import Policy
from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.training.options import TrainingOptions


class DDPOHooks:
    """Rewards and losses by DDPOTrainer's names; the trainer has the parts that they are made of."""

    config: TrainingOptions
    rewards: RewardSet
    algorithm: Algorithm
    policy: Policy

    def compute_rewards(self, prompt_image_pairs: Sequence[tuple], is_async: bool = False) -> list[tuple[Tensor, Any]]:
        """Score `(images, prompts, prompt_metadata)` batches: a (rewards, reward_metadata) each.

        Rewards are the weighted sum of all reward functions, (B,).
        """
        return self.rewards.combined(prompt_image_pairs, self.config.max_workers if is_async else 1)

    def compute_loss(self, items: Any, conditioning: Conditioning) -> LossOutput:
        """Return the objective's loss on one micro-batch."""
        return self.algorithm.objective(self.policy.velocity, items, conditioning, self.policy.reference)

    def calculate_loss(self, items: Any, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """Return DDPOTrainer's `(loss, approx_kl, clipfrac)` of one micro-batch; NaN where there is no ratio."""
        output = self.compute_loss(items, conditioning)
        none = torch.full_like(output.loss.detach(), float("nan"))
        return output.loss, output.metrics.get("approx_kl", none), output.metrics.get("clipfrac", none)

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        """Return DDPOTrainer's formula, by the same function that trains."""
        return clipped_surrogate(ratio.log(), torch.zeros_like(ratio), advantages, clip_range).loss
