"""The parts of the method that a configuration names, each chosen once, here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_tafs.advantages import Advantages, Credit, PerPromptStatTracker
from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.kernels import KERNELS, Kernel
from trl_tafs.losses import clip_range_for
from trl_tafs.objectives import OBJECTIVES, Objective
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.rollout import default_scored_steps


@dataclass(frozen=True)
class Algorithm:
    """What rolls out, what is scored, who is credited, what is minimised."""

    kernel: Kernel
    levels: Tensor  # (N + 1,) on the training device
    latent_shape: tuple[int, ...]
    scored_steps: range  # 0-based
    advantages: Advantages
    stat_tracker: PerPromptStatTracker | None
    clip_range: float  # in the units of the reduction
    objective: Objective


def build_algorithm(
    config: TAFSGRPOConfig, pipeline: TAFSPipelineMixin, height: int, width: int, device: torch.device
) -> Algorithm:
    """The algorithm that `config` asks for, at one image size."""
    kernel = build_kernel(config)
    latent_shape = pipeline.latent_shape(height, width)
    credit = Credit("terminal" if config.credits_final_image else config.step_credit, config.num_advantage_steps)
    buffer, least = config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
    tracker = PerPromptStatTracker(buffer, least) if config.per_prompt_stat_tracking else None
    clip_range = config.train_clip_range or clip_range_for(config.train_log_prob_reduction, math.prod(latent_shape))
    return Algorithm(
        kernel=kernel,
        levels=pipeline.rollout_levels(config.sample_num_steps, height, width).to(device),
        latent_shape=latent_shape,
        scored_steps=credit.scored_steps(default_scored_steps(kernel, config.sample_num_steps)),
        advantages=Advantages(
            credit=credit,
            scale=config.scale_rewards,
            aggregation=config.multi_objective_aggregation,
            own_baseline=kernel.scores_mean or kernel.num_actions > 1,
            drop_mean=kernel.scores_mean,
            clip=config.train_adv_clip_max,
            tracker=tracker,
        ),
        stat_tracker=tracker,
        clip_range=clip_range,
        objective=build_objective(config, kernel, clip_range),
    )


def build_objective(config: TAFSGRPOConfig, kernel: Kernel, clip_range: float) -> Objective:
    """The objective with its own options."""
    ratio = {"clip_range": clip_range, "reduction": config.train_log_prob_reduction}
    forward = {
        "levels": config.forward_levels,
        "images": config.forward_images,
        "num_levels": config.forward_num_levels,
        "nft_beta": config.nft_beta,
        "adv_clip": config.train_adv_clip_max,
        "weighting": config.level_weighting,
    }
    options = {
        "clipped": {"kernel": kernel, "level_weighting": config.level_weighting, **ratio},
        "forward": forward,
        "awm": forward | ratio,
    }
    return OBJECTIVES[config.objective](beta=config.beta, **options[config.objective])


def build_kernel(config: TAFSGRPOConfig) -> Kernel:
    """The transition kernel with its own options."""
    options = {
        "annealed": {"eta": config.sample_eta},
        "clean": {"kappa": config.sample_kappa, "baseline": config.clean_baseline},
    }
    return KERNELS[config.sample_kernel](
        num_actions=config.num_perturbations,
        antithetic=config.antithetic_perturbations,
        **options[config.sample_kernel],
    )
