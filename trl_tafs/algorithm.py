"""The parts of the method that a configuration names, each chosen once, here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trl_tafs.method.advantages import Advantages, AdvantageTable, PerPromptStatTracker
from trl_tafs.method.allocation import (
    FixedGroups,
    GroupBounds,
    GroupSizes,
    PromptTracker,
    StreamingGroups,
    VarianceGroups,
    images_of_equal_prompts,
)
from trl_tafs.method.credit import Credit, TerminalCredit
from trl_tafs.method.distribution import DistributionMatching
from trl_tafs.method.kernels import Kernel, Windowed
from trl_tafs.method.levels import SlidingWindow
from trl_tafs.method.objective import Objective
from trl_tafs.method.options import MethodOptions
from trl_tafs.method.papers import TAFS_GRPO, Paper
from trl_tafs.method.rollout import default_scored_steps
from trl_tafs.method.superflow import BetaBelief, ExpectedBaseline, SuperFlowGroups
from trl_tafs.method.types import PromptBatch, RewardTable


@dataclass(frozen=True)
class Algorithm:
    """What rolls out, what is scored, who is credited, what is minimised."""

    kernel: Kernel
    window: SlidingWindow | None  # of the steps where the kernel acts; None: wherever it can
    levels: Tensor  # (N + 1,) on the training device
    latent_shape: tuple[int, ...]
    groups: GroupSizes
    prompt_tracker: PromptTracker | None
    averages_prompts: bool  # the loss is the mean over prompts, or over images
    advantages: Advantages
    stat_tracker: PerPromptStatTracker | None
    clip_range: float  # in the units of the reduction
    objective: Objective
    distribution: DistributionMatching | None  # beside it
    ratio_limit: str  # what clips ratios, with its value, for a warning

    def kernel_at(self, epoch: int) -> Kernel:
        """Return the kernel of an epoch: with its window, where there is one."""
        return self.kernel if self.window is None else Windowed(self.kernel, self.window.at(epoch))

    def credit(self, rewards: RewardTable, prompts: PromptBatch, epoch: int) -> AdvantageTable:
        """Return an epoch's advantages (B, S, M), with the combined rewards that they come from (Eq. 9 and 10)."""
        scored = self.levels[list(self.scored_steps_at(epoch))]
        trained = len(self.kernel_at(epoch).trained_steps(len(self.levels) - 1))
        table = self.advantages(rewards, prompts.group_ids, prompts.prompts, trained, scored)
        if not self.averages_prompts:
            return table
        weights = images_of_equal_prompts(prompts.group_ids)[:, None, None]
        return dataclasses.replace(table, advantages=table.advantages * weights)

    def states(self) -> dict[str, Any]:
        """Return what it learns from epoch to epoch, by name: objects with `state_dict` and `load_state_dict`."""
        found = {"stat_tracker": self.stat_tracker, "prompt_tracker": self.prompt_tracker}
        return {name: item for name, item in found.items() if item is not None}

    def papers(self) -> list[Paper]:
        """Return what a run by it cites: TAFS-GRPO's paper, and those of its parts that say one."""
        parts = (self.kernel, self.window, self.advantages.credit.rule, self.groups, self.objective, self.distribution)
        found = [TAFS_GRPO, *(getattr(part, "paper", None) for part in parts)]
        return [paper for paper in dict.fromkeys(found) if paper is not None]

    def scored_steps_at(self, epoch: int) -> range:
        """Return the steps, 0-based, whose clean images are scored in an epoch."""
        num_steps = len(self.levels) - 1
        return self.advantages.credit.scored_steps(default_scored_steps(self.kernel_at(epoch), num_steps), num_steps)


def build_algorithm(
    config: MethodOptions, sizes: GroupBounds, levels: Tensor, latent_shape: tuple[int, ...]
) -> Algorithm:
    """Make the algorithm that `config` asks for.

    Args:
        config: what is chosen.
        sizes: of groups, in images.
        levels: (N + 1,) of the sampler, on the training device.
        latent_shape: of one image.
    """
    kernel = config.kernel_class.from_options(config)
    buffer, least = config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
    tracker = PerPromptStatTracker(buffer, least) if config.per_prompt_stat_tracking else None
    prompt_tracker = build_prompt_tracker(config)
    groups = build_groups(config, sizes, prompt_tracker)
    normalizer = (
        ExpectedBaseline(groups.belief, config.scale_rewards) if isinstance(groups, SuperFlowGroups) else tracker
    )
    reduction, num_elements = config.log_prob_reduction, math.prod(latent_shape)
    clip_range = config.train_clip_range or config.objective_class.default_clip_range(reduction, num_elements)
    limit = f"train_clip_range={clip_range:.3g} ({reduction})"
    if config.train_kl_limit is not None:
        limit = f"train_kl_limit={config.train_kl_limit:g}"
    return Algorithm(
        kernel=kernel,
        window=build_window(config),
        levels=levels,
        latent_shape=latent_shape,
        groups=groups,
        prompt_tracker=prompt_tracker,
        averages_prompts=config.group_averaging == "prompts",
        advantages=Advantages(
            credit=build_credit(config),
            scale=config.scale_rewards,
            aggregation=config.multi_objective_aggregation,
            own_baseline=kernel.scores_mean or kernel.num_actions > 1,
            drop_mean=kernel.scores_mean,
            clip=config.train_adv_clip_max,
            tracker=normalizer,
            baseline=prompt_tracker.means if normalizer is None and prompt_tracker and sizes.least == 1 else None,
        ),
        stat_tracker=tracker,
        clip_range=clip_range,
        objective=config.objective_class.from_options(config, kernel, clip_range),
        distribution=DistributionMatching(config.dm_weight, config.dm_level_shift) if config.dm_weight else None,
        ratio_limit=limit,
    )


def build_credit(config: MethodOptions) -> Credit:
    """Make the credit rule; objectives of the final image know one reward only."""
    rule = TerminalCredit() if config.credits_final_image else config.credit_rule
    return Credit(rule, config.num_advantage_steps)


def build_window(config: MethodOptions) -> SlidingWindow | None:
    """Make the window in which the sampler explores; None if it explores everywhere."""
    if config.sample_window_size is None:
        return None
    return SlidingWindow(
        size=config.sample_window_size,
        num_steps=config.sample_window_range or config.sample_num_steps - 1,
        interval=config.sample_window_interval,
        order=config.sample_window_order,
        seed=config.seed,
    )


def build_prompt_tracker(config: MethodOptions) -> PromptTracker | None:
    """Make the memory of each prompt's rewards, one value a scored step; None for fixed groups."""
    if config.group_allocation == "fixed":
        return None
    num_values = len(build_credit(config).scored_steps(range(config.num_trained_steps), config.sample_num_steps))
    return PromptTracker(num_values, config.group_memory, config.group_tracker_capacity)


def build_groups(config: MethodOptions, sizes: GroupBounds, tracker: PromptTracker | None) -> GroupSizes:
    """Choose how an epoch's images are shared among its prompts."""
    if tracker is None:
        return FixedGroups(sizes.mean)
    if config.group_allocation == "superflow":
        reward_range = None if config.reward_range is None else (config.reward_range[0], config.reward_range[1])
        return SuperFlowGroups(BetaBelief(tracker, reward_range), sizes.mean, config.group_bins)
    allocation = {"variance": VarianceGroups, "streaming": StreamingGroups}[config.group_allocation]
    return allocation(tracker, sizes.mean, sizes.least, sizes.most, config.group_optimism)
