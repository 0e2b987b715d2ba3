"""The settings of a run with what was resolved, and which of them make what it computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trl_tafs.algorithm import Algorithm
from trl_tafs.output.secrets import without_secrets
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan

NOT_PART_OF_THE_RESULT = {  # may differ between a checkpoint and the run that resumes it
    *("resume_from", "num_epochs", "exp_name", "run_name", "logdir", "project_kwargs", "disable_tqdm", "save_freq"),
    *("log_with", "tracker_kwargs", "tracker_project_name", "num_checkpoint_limit", "sample_grid_freq", "max_workers"),
    *("async_reward_computation", "reward_max_retries", "reward_retry_delay", "push_to_hub", "hub_model_id"),
    *(
        "preflight_rollout",
        "reward_on_failure",
        "train_max_skipped_steps",
        "prompt_cache_dir",
        "model_cpu_offload",
        "decode_batch_size",
        "picture_freq",
        "picture_prompts",
    ),
}

WRITTEN = ("num_processes", "levels")  # beside the options, of every run
FACTS = (*WRITTEN, "frozen_adapters")  # where there are any


def resolved_settings(
    config: TrainingOptions, plan: EpochPlan, algorithm: Algorithm, height: int, width: int
) -> dict[str, Any]:
    """Return the configuration with what was resolved, as plain values that a tracker can store, without secrets.

    Trackers, the local log, checkpoints, kept rollouts and the card take them from here.
    `TAFSGRPOConfig.from_settings` reads them.
    """
    resolved = {
        "num_generations": plan.group_size,
        "height": height,
        "width": width,
        "num_processes": plan.world_size,
        "levels": [round(level, 6) for level in algorithm.levels.tolist()],
    }
    if "train_clip_range" in config.objective_class.reads.values() and config.train_kl_limit is None:
        resolved["train_clip_range"] = algorithm.clip_range
    values = without_secrets(dataclasses.asdict(config) | resolved)
    return {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v, default=str) for k, v in values.items()}


def lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that make what a run computes."""
    return {name: value for name, value in settings.items() if name not in NOT_PART_OF_THE_RESULT}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return `name old -> new` of each lasting setting that differs."""
    differ = {name: value for name, value in lasting(after).items() if before.get(name) != value}
    return [f"{name} {before.get(name)} -> {value}" for name, value in differ.items()]
