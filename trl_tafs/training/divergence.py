"""A run that diverges stops on all processes together, says which checkpoints are left, and writes nothing more."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.policy.policy import Policy
from trl_tafs.processes import any_process
from trl_tafs.training.checkpoint_files import checkpoints
from trl_tafs.training.options import TrainingOptions


def left_over(config: TrainingOptions) -> str:
    """Return a sentence about the checkpoints that a run which can't go on has left."""
    done = checkpoints(Path(config.project_dir) / "checkpoints")
    if not done:
        return "No checkpoint was written"
    before = f", or an earlier one, such as {done[-2]}" if len(done) > 1 else ""
    return (
        f"Its last checkpoint, whose weights are finite, is {done[-1]}: change the settings and resume from it{before}"
    )


def remedy(config: TrainingOptions) -> str:
    """Return what to change in a run that diverges."""
    precision = ', or use mixed_precision="bf16"' if config.mixed_precision == "fp16" else ""
    return (
        f"lower train_learning_rate ({config.train_learning_rate:g}) or train_max_grad_norm "
        f"({config.train_max_grad_norm:g}){precision}"
    )


def check_weights(policy: Policy, config: TrainingOptions, when: str) -> None:
    """Raise NonFiniteError on every process if a trained weight isn't finite on any; one host copy.

    Called after an epoch's updates, and before weights are written anywhere.
    """
    if any_process(policy.accelerator, not policy.is_finite()):
        name = policy.non_finite_name() or "a copy, or another process's"
        raise NonFiniteError(
            f"{when}: the run has diverged: trained weights ({name}) are NaN or infinite; {remedy(config)}. "
            f"{left_over(config)}"
        )


def check_advantages(advantages: Tensor, config: TrainingOptions, when: str) -> None:
    """Raise NonFiniteError if an epoch's advantages, (B, S, M) of all processes on the CPU, aren't finite."""
    if not advantages.isfinite().all():
        raise NonFiniteError(
            f"{when}: step_credit={config.step_credit!r} made NaN of finite rewards; its values must be finite. "
            f"{left_over(config)}"
        )


def check_skipped(skipped: int, norm: float, loss: float, config: TrainingOptions, when: str) -> None:
    """Raise NonFiniteError once `skipped` optimizer steps in a row are as many as may be left out."""
    if skipped >= config.max_skipped_steps:
        raise NonFiniteError(
            f"{when}: the run has diverged: {skipped} optimizer steps in a row were left out, since their gradient "
            f"isn't finite (the last one's norm is {norm}, the loss {loss}); {remedy(config)}. {left_over(config)}"
        )
