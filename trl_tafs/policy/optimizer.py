"""AdamW, its learning-rate schedule, and their settings after a resume."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from trl_tafs.output.errors import require
from trl_tafs.policy.options import OptimizerOptions


def make_optimizer(
    parameters: list[nn.Parameter], config: OptimizerOptions, rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit state; `rate` is another one than `train_learning_rate`."""
    if config.train_use_8bit_adam:
        optimizer_class = require("bitsandbytes", "train_use_8bit_adam", "8bit").optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW
    return optimizer_class(
        parameters,
        lr=rate or config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerOptions, total_steps: int) -> Any:
    """Diffusers' `get_scheduler`, over `total_steps` optimizer steps."""
    from diffusers.optimization import get_scheduler

    if config.train_lr_warmup_steps > total_steps > 0:
        warnings.warn(
            f"train_lr_warmup_steps is {config.train_lr_warmup_steps}, and the run has {total_steps} optimizer steps",
            stacklevel=2,
        )
    return get_scheduler(
        config.train_lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=config.train_lr_warmup_steps,
        num_training_steps=total_steps,
    )


def set_options(optimizer: Any, config: OptimizerOptions, rate: float) -> None:
    """Give all parameters the learning rate and the configuration's other settings of AdamW."""
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = rate, (config.train_adam_beta1, config.train_adam_beta2)
        group["weight_decay"], group["eps"] = config.train_adam_weight_decay, config.train_adam_epsilon


def apply_settings(optimizer: Any, lr_scheduler: Any, config: OptimizerOptions) -> None:
    """Make the configuration's optimizer settings hold after a resume, which restores the checkpoint's."""
    lr_scheduler.base_lrs = [config.train_learning_rate] * len(lr_scheduler.base_lrs)
    set_options(optimizer, config, config.train_learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.train_learning_rate
    rates = [
        rate * factor(lr_scheduler.last_epoch)
        for rate, factor in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates
