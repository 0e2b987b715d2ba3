"""`TAFSGRPOConfig`: DDPOConfig's fields with DDPOTrainer's meaning, GRPOConfig's names, and what TAFS adds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trl_tafs.hub.options import PublishingOptions
from trl_tafs.method.credit import CREDITS
from trl_tafs.method.guidance import is_guided
from trl_tafs.method.kernels import KERNELS
from trl_tafs.options import field_types
from trl_tafs.output.errors import did_you_mean, one_line, shown
from trl_tafs.output.secrets import REMOVED
from trl_tafs.presets import preset
from trl_tafs.training.settings import FACTS


@dataclass
class TAFSGRPOConfig(PublishingOptions):
    """Configuration of [`TAFSGRPOTrainer`]; read from the command line and YAML by `trl.TrlParser`.

    Each group of fields is a dataclass beside what it configures, with its own checks; here are the rules between
    groups. Defaults are the paper's where it gives them (N = 4 steps, groups of 48, AdamW 3e-4 / 1e-4, LoRA 32 / 64,
    512 px), its Eq. 10 with the next clean image as the action (docs/algorithm.md); on the sampler's own actions it is
    `from_preset("paper")`. See `docs/configuration.md` for the whole list with the reasons.
    """

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """Return a configuration with a preset's options (`trl_tafs.presets`), and `options` on top of them."""
        return cls(**preset(name) | options)

    @classmethod
    def from_settings(cls, path: str | os.PathLike, **options: Any) -> Self:
        """Return the configuration of a run by its `training_settings.json` or `config.json`, and `options` on top.

        A new run by it has the same settings, given the same number of processes, but for `resume_from`, which is left
        out, and for what was taken out before the file was written (secrets, names, folders of a path): a warning
        names what is missing altogether.

        Raises:
            ValueError: the file can't be read, or isn't such settings.
        """
        return cls(**read_settings(path) | options)

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
        if self.group_allocation == "superflow" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "group_allocation='superflow' knows what is expected of the sum of the rewards: use "
                "multi_objective_aggregation='sum_then_normalize'"
            )
        if self.min_generations == 1 and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "min_generations=1 takes a prompt's expected reward as the baseline, which is known of the sum of the "
                "rewards: use multi_objective_aggregation='sum_then_normalize', or min_generations=2"
            )
        if self.model_cpu_offload and self.async_reward_computation:
            raise ValueError(
                "model_cpu_offload takes the denoiser off the GPU while rewards score, and async_reward_computation "
                "scores while the denoiser samples; use one of them"
            )
        if self.project_kwargs.get("total_limit") and self.num_checkpoint_limit != type(self).num_checkpoint_limit:
            raise ValueError(
                f"project_kwargs has total_limit={self.project_kwargs['total_limit']}, and num_checkpoint_limit is "
                f"{self.num_checkpoint_limit}; give one of them"
            )
        if idle := idle_options(self):
            told = "; ".join(f"{name}={shown(getattr(self, name))} needs {need}" for name, need in idle.items())
            raise ValueError(f"options without effect: {told}; leave them out, or give what they need")


def idle_options(config: TAFSGRPOConfig) -> dict[str, str]:
    """Return the options that were given and that nothing reads, each with what would read it."""
    window, tracked = config.sample_window_size is not None, config.per_prompt_stat_tracking
    varying, guided = config.group_allocation != "fixed", is_guided(config.sample_guidance_scale)
    matched = config.matches_distribution
    guided_teacher = matched and is_guided(config.teacher_guidance(False))
    read = {  # whether something reads an option, and what would
        "negative_prompts": (guided or guided_teacher, "sample_guidance_scale above 1"),
        "dm_guidance_scale": (matched, "dm_weight above 0"),
        "dm_rows": (matched, "dm_weight above 0"),
        "dm_fake_updates": (matched, "dm_weight above 0"),
        "dm_fake_learning_rate": (matched, "dm_weight above 0"),
        "dm_level_shift": (matched, "dm_weight above 0"),
        "sample_window_interval": (window, "a sample_window_size"),
        "sample_window_order": (window, "a sample_window_size"),
        "group_optimism": (varying, "group_allocation='variance' or 'streaming'"),
        "group_memory": (varying, "group_allocation='variance' or 'streaming'"),
        "group_tracker_capacity": (varying, "group_allocation='variance' or 'streaming'"),
        "per_prompt_stat_tracking_buffer_size": (tracked, "per_prompt_stat_tracking=True"),
        "per_prompt_stat_tracking_min_count": (tracked, "per_prompt_stat_tracking=True"),
        "forward_num_levels": (config.forward_levels == "random", "forward_levels='random'"),
        "torch_compile_backend": (config.torch_compile, "torch_compile=True"),
        "train_kl_rows": (config.beta > 0, "beta above 0"),
        "old_policy_ramp": (config.old_policy_decay > 0, "old_policy_decay above 0"),
        "train_timestep_fraction": (config.rows_per_image > 1, "an objective with several items an image"),
        "train_lr_warmup_steps": (config.train_lr_scheduler_type != "constant", "'constant_with_warmup', for example"),
        "train_ema_decay": (config.train_use_ema, "train_use_ema=True"),
        "lora_rank": (not config.full_finetuning, "full_finetuning=False"),
        "lora_alpha": (not config.full_finetuning, "full_finetuning=False"),
        "greater_is_better": (config.metric_for_best_model is not None, "a metric_for_best_model"),
        "picture_prompts": (config.picture_freq > 0, "picture_freq above 0"),
        "sample_grid_rows": (config.sample_grid_freq > 0, "sample_grid_freq above 0"),
    }
    of_parts = (
        ("sample_kernel", config.kernel_class, KERNELS.values()),
        ("step_credit", type(config.credit_rule), CREDITS.values()),
    )
    for chooser, chosen, others in of_parts:
        own = set(getattr(chosen, "reads", {}).values())
        for other in others:
            for name in set(getattr(other, "reads", {}).values()) - own - {"sample_eta"}:  # which has its own check
                read[name] = (False, f"another {chooser}")
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        name: need
        for name, (is_read, need) in read.items()
        if name in fields and not is_read and getattr(config, name) not in (fields[name], None)
    }


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Return the options of a run that `training_settings.json` or `config.json` holds; see `from_settings`."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no file, no UTF-8, no JSON
        raise ValueError(f"{path} can't be read as settings: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not settings by name")
    hints, found, removed = field_types(TAFSGRPOConfig), {}, []
    for name, value in settings.items():
        if name in (*FACTS, "resume_from"):
            continue
        if name not in hints:
            raise ValueError(f"{path}: there is no option {shown(name)}{did_you_mean(name, hints)}")
        if REMOVED in json.dumps(value):
            removed.append(name)
            continue
        if isinstance(value, str) and (value == "null" or "list" in str(hints[name])):  # as trackers store them
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        found[name] = value
    if removed:
        warnings.warn(f"{path}: {', '.join(removed)} can't be read, since secrets or names were removed", stacklevel=3)
    return found
