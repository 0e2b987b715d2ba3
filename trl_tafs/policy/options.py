"""The options of what is trained: a LoRA or the whole denoiser, and the optimizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.method.distribution_options import DistributionOptions
from trl_tafs.method.sampling_options import SamplingOptions
from trl_tafs.options import (
    Options,
    RunOptions,
    check_at_least,
    check_at_least_1_or_none,
    check_choice,
    check_not_empty,
    check_positive,
    check_share,
    option,
)
from trl_tafs.output.errors import shown
from trl_tafs.pipelines.options import PipelineOptions

# Those of diffusers' get_scheduler that need a number of steps and no more, and are a factor on the rate.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass
class OptimizerOptions(Options):
    """AdamW and its learning rate."""

    title: ClassVar[str] = "Optimizer"

    train_learning_rate: float = option(3e-4, "AdamW's (paper: 3e-4).")
    train_lr_scheduler_type: str = option(
        "constant", f"The learning rate's course over the run: {', '.join(LR_SCHEDULERS)} (diffusers' get_scheduler)."
    )
    train_lr_warmup_steps: int = option(0, "Optimizer steps of warm-up.")
    train_adam_beta1: float = option(0.9, "AdamW's beta1.")
    train_adam_beta2: float = option(0.999, "AdamW's beta2.")
    train_adam_weight_decay: float = option(1e-4, "AdamW's weight decay (paper: 1e-4).")
    train_adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    train_use_8bit_adam: bool = option(False, "bitsandbytes' 8-bit AdamW.")
    train_max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    train_max_skipped_steps: int | None = option(
        None,
        "Stop once so many optimizer steps in a row were left out, since their gradient isn't finite. None: 5, or 20 "
        "with mixed_precision=fp16, whose loss scale finds its size that way.",
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "train_lr_scheduler_type", LR_SCHEDULERS)
        check_positive(self, "train_learning_rate", "train_adam_epsilon", "train_max_grad_norm")
        check_at_least(self, 0, "train_lr_warmup_steps", "train_adam_weight_decay")
        check_at_least_1_or_none(self, "train_max_skipped_steps")
        check_share(self, "train_adam_beta1", "train_adam_beta2")


@dataclass
class AdapterOptions(Options):
    """The weights that are trained."""

    title: ClassVar[str] = "Policy"

    train_gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    torch_compile: bool = option(
        False,
        "Compile the denoiser (torch.compile): for rollout, update and base. Worth it where the host is slower than "
        "the GPU; the first epoch takes minutes longer. Names of weights stay as they are.",
    )
    torch_compile_backend: str = option("inductor", "Backend of torch_compile.")
    attention_backend: str | None = option(
        None,
        "How the denoiser computes attention, of diffusers' set_attention_backend: native, flash, ... None: its own.",
    )
    train_use_ema: bool = option(False, "Evaluate and save an exponential average of the adapter.")
    train_ema_decay: float = option(0.99, "Its decay an optimizer step.")
    full_finetuning: bool = option(
        False,
        "Train the whole denoiser in float32 instead of a LoRA on it; give it a far smaller train_learning_rate "
        "(1e-5). It takes 20 bytes a parameter: weights, gradient, two moments, and the base for the KL.",
    )
    lora_rank: int = option(32, "Rank (paper: 32).")
    lora_alpha: int = option(64, "Alpha (paper: 64).")
    lora_target_modules: list[str] | None = option(None, "None: the family's attention projections.")
    adapter_name_or_path: str | None = option(None, "A LoRA in diffusers' format, local or on the Hub, to continue.")
    model_adapter_name: str | None = option(
        None,
        "Name of the LoRA that is trained: one that the pipeline carries, or a new one above those that it carries, "
        "which stay active and frozen. None: the one that it carries, or else a new one.",
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_at_least(self, 1, "lora_rank", "lora_alpha")
        if self.model_adapter_name is not None and not re.fullmatch(r"\w[\w-]*", self.model_adapter_name):
            raise ValueError(
                f"model_adapter_name is {shown(self.model_adapter_name)}; use letters, digits, _ and - (PEFT puts it "
                "into the names of weights)"
            )
        check_share(self, "train_ema_decay")
        check_not_empty(self, "torch_compile_backend", "attention_backend")
        check_not_empty(self, "adapter_name_or_path")


@dataclass
class OldPolicyOptions(Options):
    """The lagging policy that draws the rollouts."""

    title: ClassVar[str] = "Old policy"

    old_policy_decay: float = option(
        0.0, "Share of the old policy, which draws the rollouts, that an epoch keeps; 0: it is the present one."
    )
    old_policy_ramp: float = option(
        0.001, "The decay grows by this an epoch up to old_policy_decay (DiffusionNFT: .001 up to .5)."
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_share(self, "old_policy_decay")
        check_at_least(self, 0, "old_policy_ramp")
        if self.old_policy_decay and not self.old_policy_ramp > 0:
            raise ValueError(f"old_policy_ramp is {self.old_policy_ramp}; it must be above 0 for old_policy_decay")


@dataclass
class PolicyOptions(
    AdapterOptions,
    OptimizerOptions,
    OldPolicyOptions,
    DistributionOptions,
    PipelineOptions,
    SamplingOptions,
    RunOptions,
):
    """All that the policy is made from."""

    @property
    def fake_learning_rate(self) -> float:
        """`dm_fake_learning_rate`, or its default."""
        return self.dm_fake_learning_rate or 3 * self.train_learning_rate

    @property
    def max_skipped_steps(self) -> int:
        """`train_max_skipped_steps`, or its default."""
        return self.train_max_skipped_steps or (20 if self.mixed_precision == "fp16" else 5)

    def check(self) -> None:
        """Raise ValueError for what can't work together."""
        if self.full_finetuning:
            wrong = ("model_cpu_offload", "adapter_name_or_path", "model_adapter_name", "lora_target_modules")
            if given := [name for name in wrong if getattr(self, name)]:
                raise ValueError(f"full_finetuning trains no LoRA, and moves no weights; leave out {', '.join(given)}")
            if self.matches_distribution:
                raise ValueError(
                    f"dm_weight={self.dm_weight} needs a frozen base, for its teacher and its fake score, and "
                    "full_finetuning=True trains all of it; use one of them"
                )
