"""Trial steps of an update, watched: gradients by parameter, the ratio on policy, the replay's distance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trl_tafs.method.kernels import clean_estimate
from trl_tafs.method.types import Conditioning, LossOutput
from trl_tafs.policy.policy import Policy
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.training.experience import Experience, ScoredBatch
from trl_tafs.training.logs import Stopwatch
from trl_tafs.training.progress import Progress
from trl_tafs.training.updater import Updater

SCALED_STEPS = 12  # optimizer steps that float16's loss scale may take to come down


@dataclass(frozen=True)
class TrialStep:
    """What one optimizer step showed."""

    peaks: Tensor  # (P,) the largest absolute gradient of each trained parameter on all processes, on the CPU
    ratio: float | None  # the largest |ratio - 1| of all micro-batches; None: the objective has none
    seconds: float


class WatchedLoss:
    """A loss that remembers the largest `ratio_deviation` of what it returned."""

    def __init__(self, loss: Callable[[Any, Conditioning], LossOutput]) -> None:
        self.loss = loss
        self.ratio: float | None = None

    def __call__(self, items: Any, conditioning: Conditioning) -> LossOutput:
        """Return the loss of a micro-batch."""
        output = self.loss(items, conditioning)
        if "ratio_deviation" in output.metrics:
            self.ratio = max(self.ratio or 0.0, output.metrics["ratio_deviation"].item())
        return output


def trial_step(updater: Updater, experience: Experience, advantages: Tensor, epoch: int) -> TrialStep:
    """Take the first optimizer step of an update; with float16, once its loss scale fits."""
    policy, watch = updater.policy, Stopwatch()
    accelerator, parameters = policy.accelerator, policy.parameters
    loss = WatchedLoss(updater.loss)
    updater = dataclasses.replace(updater, loss=loss, stopwatch=watch)
    peaks = torch.zeros(len(parameters), device=accelerator.device)

    def hook(index: int, gradient: Tensor) -> None:
        peaks[index] = torch.maximum(peaks[index], gradient.detach().abs().amax().float())

    trained = [(i, parameter) for i, parameter in enumerate(parameters) if parameter.requires_grad]
    with removed(parameter.register_hook(partial(hook, i)) for i, parameter in trained):
        for _ in range(1 if accelerator.scaler is None else SCALED_STEPS):
            peaks.zero_()
            updates = dataclasses.replace(updater, progress=Progress()).update(experience, advantages, epoch)
            next(updates)
            updates.close()
            seconds = watch.pop()["time/update"]
            if not accelerator.optimizer_step_was_skipped:
                break
    return TrialStep(accelerator.gather(peaks[None]).amax(0).cpu(), loss.ratio, seconds)


@torch.no_grad()
def prediction_distance(policy: Policy, encode: PromptEncoder, batches: Sequence[ScoredBatch], size: int) -> float:
    """Evaluate the rollouts' states again, `size` rows at a time: the rms distance of the clean estimates, relative."""
    distance, norm = 0.0, 0.0
    with policy.sampling():
        for batch in batches:
            rollout, steps = batch.rollout, batch.rollout.steps
            states, before = rollout.states.flatten(0, 1), rollout.clean[:, steps].flatten(0, 1)
            levels = rollout.levels[steps].repeat(len(batch.prompts))
            prompts = [prompt for prompt in batch.prompts.prompts for _ in steps]
            for i in range(0, len(states), size):
                part = slice(i, i + size)
                v = policy.velocity(states[part], levels[part], encode(prompts[part]))
                after = clean_estimate(states[part].float(), v, levels[part])
                distance += (after - before[part]).double().square().sum().item()
                norm += before[part].double().square().sum().item()
    return math.sqrt(distance / norm) if norm else 0.0


def trained_names(policy: Policy) -> list[str]:
    """Return the trained parameters' names, without the adapter's, in their order."""
    names = {id(parameter): name for name, parameter in policy.pipeline.denoiser.named_parameters()}
    adapter = f".{policy.adapter_name}."
    return [names[id(parameter)].replace(adapter, ".").removesuffix(".weight") for parameter in policy.parameters]


@contextmanager
def removed(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep the hooks inside, and remove them afterwards, whatever happens."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
