"""`TAFSGRPOConfig`: DDPOConfig's fields with DDPOTrainer's meaning, GRPOConfig's names, and what TAFS adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from trl_tafs.hub.options import PublishingOptions
from trl_tafs.presets import preset


@dataclass
class TAFSGRPOConfig(PublishingOptions):
    """Configuration of [`TAFSGRPOTrainer`]; read from the command line and YAML by `trl.TrlParser`.

    Each group of fields is a dataclass beside what it configures, with its own checks; here are the rules between
    groups. Defaults are the paper's where it gives them (N = 4 steps, groups of 48, AdamW 3e-4 / 1e-4, LoRA 32 / 64,
    512 px), but for the objective: its Eq. 10 learns slowly where the latent space is large (docs/learning.md), and is
    `from_preset("paper")`. See `docs/configuration.md` for the whole list with the reasons.
    """

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """Return a configuration with a preset's options (`trl_tafs.presets`), and `options` on top of them."""
        return cls(**preset(name) | options)

    def check(self) -> None:
        """Raise ValueError for what can't work together."""
        if self.per_prompt_stat_tracking and self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} has no effect with per_prompt_stat_tracking, which divides by a "
                "prompt's own deviation; leave one of them out"
            )
        if self.group_allocation == "superflow" and self.scale_rewards == "group":
            raise ValueError(
                "group_allocation='superflow' compares with what is expected of a prompt, not with its group, and "
                "scale_rewards='group' has no effect; use scale_rewards='batch'"
            )
        if self.group_allocation == "superflow" and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "group_allocation='superflow' knows what is expected of the sum of the rewards: use "
                "multi_objective_aggregation='sum_then_normalize'"
            )
        if self.min_generations == 1 and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "min_generations=1 takes a prompt's expected reward as the baseline, which is known of the sum of the "
                "rewards: use multi_objective_aggregation='sum_then_normalize', or min_generations=2"
            )
        if self.model_cpu_offload and self.async_reward_computation:
            raise ValueError(
                "model_cpu_offload takes the denoiser off the GPU while rewards score, and async_reward_computation "
                "scores while the denoiser samples; use one of them"
            )
