"""The methods of DDPOTrainer that its subclasses override: those that train here too, and what replaces the others."""

from __future__ import annotations

import inspect
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

REPLACED = {  # methods of DDPOTrainer that nothing would call here, and what to use instead
    "calculate_loss": "override compute_loss(items, conditioning), which returns a LossOutput",
    "reward_fn": "pass reward_function to the constructor, or override compute_rewards",
    "prompt_fn": "pass prompt_function to the constructor",
    "image_samples_callback": "pass image_samples_hook to the constructor",
    "_image_samples_callback": "pass image_samples_hook to the constructor",
    "_generate_samples": "sampling is a kernel's (docs/extending.md)",
    "_train_batched_samples": "override compute_loss or step, or write an objective (docs/extending.md)",
    "_config_check": "subclass TAFSGRPOConfig and define check",
    "_setup_optimizer": "set train_learning_rate, train_lr_scheduler_type, train_adam_* or train_use_8bit_adam",
    "_save_model_hook": "override save_checkpoint or save_pretrained",
    "_load_model_hook": "override save_checkpoint or save_pretrained, and use resume_from",
    "_save_pretrained": "override save_pretrained",
}


class DDPOHooks:
    """Rewards and losses by DDPOTrainer's names, which training calls; the trainer has what they are made of."""

    config: TrainingOptions
    reward_functions: RewardSet
    algorithm: Algorithm
    policy: Policy

    def training_rewards(self) -> RewardSet:
        """Return what training scores with: the reward functions, or an overridden `compute_rewards` as one reward.

        Raises:
            TypeError: a subclass defines a method that training wouldn't call.
        """
        self._check_overridden()
        if type(self).compute_rewards is DDPOHooks.compute_rewards:
            return self.reward_functions

        def compute_rewards(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> tuple[Any, Any]:
            rewards, reward_metadata = self.compute_rewards([(images, prompts, metadata)])
            return rewards[0], reward_metadata[0]

        return RewardSet.of(self.config, {"compute_rewards": compute_rewards})

    def _check_overridden(self) -> None:
        name = type(self).__name__
        for method, instead in REPLACED.items():
            if hasattr(type(self), method):
                raise TypeError(f"{name}.{method} is a method of DDPOTrainer that nothing calls here; {instead}")
        call = inspect.signature(self.config.objective_class.__call__).parameters
        formula = type(self).loss is not DDPOHooks.loss
        if formula and "surrogate" not in call:
            raise TypeError(
                f"{name}.loss is the formula of the clipped ratio, which objective={self.config.objective!r} has no "
                "use for; use objective='clipped', or override compute_loss"
            )
        if formula and self.config.train_kl_limit is not None:
            raise TypeError(
                f"{name}.loss stands for the clipped surrogate, which train_kl_limit replaces; use one of them"
            )

    def compute_rewards(
        self, prompt_image_pairs: Sequence[tuple], is_async: bool = False
    ) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """Score `(images, prompts, prompt_metadata)` batches: their rewards, (B,) each, and their reward metadata.

        Rewards are the weighted sum of all reward functions, float64. An override is called with one batch of one
        scored step at a time, in a thread with `async_reward_computation`; what it returns is training's only reward.
        """
        scored = self.reward_functions.combined(prompt_image_pairs, self.config.max_workers if is_async else 1)
        return tuple(rewards for rewards, _ in scored), tuple(metadata for _, metadata in scored)

    def compute_loss(self, items: Any, conditioning: Conditioning) -> LossOutput:
        """Return the objective's loss on one micro-batch."""
        objective: Any = self.algorithm.objective
        overridden = getattr(self.loss, "__func__", None) is not DDPOHooks.loss
        options = {"surrogate": self.loss} if overridden else {}
        return objective(self.policy.velocity, items, conditioning, self.policy.reference, **options)

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        """Return DDPOTrainer's formula, the mean over T items and their M actions, by the function that trains.

        Args:
            advantages: (T, M), times the weights of their levels (`train_level_weighting`).
            clip_range: in the units of `train_log_prob_reduction`.
            ratio: (T, M), with gradient.
        """
        return clipped_surrogate(ratio.log(), torch.zeros_like(ratio), advantages, clip_range).loss
