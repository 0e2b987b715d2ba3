"""The options of the training: the update, and what is looked at on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.method.distribution_options import DistributionOptions
from trl_tafs.method.guidance import is_guided
from trl_tafs.method.options import CreditOptions, LossOptions, MethodOptions, ObjectiveOptions
from trl_tafs.method.sampling_options import MAX_STEPS, SamplingOptions
from trl_tafs.options import Options, RunOptions, check_at_least, check_at_least_1_or_none, check_not_empty, option
from trl_tafs.output.errors import shown
from trl_tafs.pipelines.options import PipelineOptions
from trl_tafs.policy.options import AdapterOptions, OldPolicyOptions, OptimizerOptions, PolicyOptions
from trl_tafs.rewards.options import RewardOptions


@dataclass
class UpdateOptions(Options):
    """How an epoch's experience becomes optimizer steps."""

    title: ClassVar[str] = "Update"

    train_batch_size: int = option(
        8, "Rows (image, step) of one forward and backward pass. It must divide a process's images."
    )
    train_gradient_accumulation_steps: int | None = option(
        None,
        "An optimizer step takes so many times train_batch_size images, with all their steps; None: all of the "
        "epoch's, one optimizer step an inner epoch.",
    )
    train_updates_per_epoch: int | None = option(
        None,
        "Instead of train_gradient_accumulation_steps: optimizer steps of an inner epoch, each of as many images "
        "(Flow-GRPO: 2), whatever the batch sizes. None: as that says.",
    )
    train_num_inner_epochs: int = option(1, "Passes over an epoch's rollouts.")
    train_timestep_fraction: float = option(1.0, "Share of the trained steps of each image, drawn at random.")
    train_cfg: bool = option(False, "Guidance in training: must be on if and only if sample_guidance_scale > 1.")

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_at_least(self, 1, "train_batch_size", "train_num_inner_epochs")
        check_at_least_1_or_none(self, "train_gradient_accumulation_steps", "train_updates_per_epoch")
        if None not in (self.train_updates_per_epoch, self.train_gradient_accumulation_steps):
            raise ValueError(
                f"train_updates_per_epoch={self.train_updates_per_epoch} and train_gradient_accumulation_steps="
                f"{self.train_gradient_accumulation_steps} say the same; give one of them, and None for the other"
            )
        if not 0 < self.train_timestep_fraction <= 1:
            raise ValueError(f"train_timestep_fraction is {self.train_timestep_fraction}; it must lie in (0, 1]")


@dataclass
class EvaluationOptions(Options):
    """Held-out evaluation, the best checkpoint, and pictures."""

    title: ClassVar[str] = "Evaluation and pictures"

    eval_freq: int = option(
        0,
        "Epochs between evaluations on the held-out prompts; before the first and after the last, too; 0: none.",
    )
    eval_num_steps: list[int] = option([4, 8], "Step counts to evaluate.")
    eval_samplers: list[str] = option(["annealed", "ode"], "Samplers to evaluate: annealed, ode.")
    eval_images_per_prompt: int = option(1, "Images of each held-out prompt; their noise is the same each time.")
    eval_batch_size: int | None = option(None, "Images drawn at once; None: sample_batch_size.")
    metric_for_best_model: str | None = option(
        None, "Evaluated metric by which the best checkpoint is kept, e.g. eval/annealed_4/pickscore."
    )
    greater_is_better: bool = option(True, "Direction of metric_for_best_model.")
    early_stopping_patience: int | None = option(None, "Stop after so many evaluations without a better one.")
    sample_grid_freq: int = option(10, "Epochs between sample grids (PNG: a row a prompt, a column a step); 0: none.")
    sample_grid_rows: int = option(6, "Images in a sample grid.")
    picture_freq: int = option(
        10,
        "Epochs between pictures of a few fixed prompts, drawn as training samples and from the same noise each time; "
        "before the first and after the last epoch, too; 0: none.",
    )
    picture_prompts: list[str] | None = option(
        None, "Their prompts; None: the first four held-out ones or, without those, of training."
    )

    def evaluates_at(self, epoch: int, last: int) -> bool:
        """Return whether there is an evaluation when `epoch` epochs are done: every `eval_freq`, and after the last."""
        return bool(self.eval_freq) and (epoch % self.eval_freq == 0 or epoch == last)

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_at_least(self, 0, "picture_freq", "eval_freq", "sample_grid_freq")
        check_at_least(self, 1, "eval_images_per_prompt", "sample_grid_rows")
        check_at_least_1_or_none(self, "eval_batch_size", "early_stopping_patience")
        check_not_empty(self, "metric_for_best_model")
        if not set(self.eval_samplers) <= {"annealed", "ode"}:
            raise ValueError(f"eval_samplers is {shown(self.eval_samplers)}; use a list of annealed and ode")
        if not all(1 <= steps <= MAX_STEPS for steps in self.eval_num_steps):
            raise ValueError(f"eval_num_steps is {self.eval_num_steps}; give step counts of 1 to {MAX_STEPS}")
        if self.early_stopping_patience is not None and not (self.eval_freq and self.metric_for_best_model):
            raise ValueError("early_stopping_patience needs eval_freq above 0 and a metric_for_best_model")
        if self.metric_for_best_model is not None and not self.eval_freq:
            raise ValueError("metric_for_best_model needs eval_freq above 0")


@dataclass
class TrainingOptions(
    MethodOptions,
    PolicyOptions,
    # The groups, the last first: dataclasses put the fields of the last base in front.
    EvaluationOptions,
    AdapterOptions,
    LossOptions,
    OptimizerOptions,
    UpdateOptions,
    OldPolicyOptions,
    DistributionOptions,
    ObjectiveOptions,
    CreditOptions,
    RewardOptions,
    PipelineOptions,
    SamplingOptions,
    RunOptions,
):
    """All that an epoch and what surrounds it depend on."""

    @property
    def decode_size(self) -> int:
        """Images that the VAE decodes at once."""
        return self.decode_batch_size or self.sample_batch_size

    @property
    def num_replayed_rows(self) -> int:
        """Of `rows_per_image`, how many are replayed: `train_timestep_fraction` of them, at least one."""
        return max(1, int(self.rows_per_image * self.train_timestep_fraction + 1e-9))

    def check(self) -> None:
        """Raise ValueError for what can't work together."""
        if is_guided(self.sample_guidance_scale) != self.train_cfg:
            raise ValueError(
                f"sample_guidance_scale={self.sample_guidance_scale} with train_cfg={self.train_cfg}: rollout and "
                "training must use the same guidance, or the ratio isn't 1 on policy; use sample_guidance_scale=1 "
                "with train_cfg=False, or a scale above 1 with train_cfg=True"
            )
