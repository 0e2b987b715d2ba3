"""`Preflight`: what is tried before anything is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_tafs.output.speech import say
from trl_tafs.pipelines.finite import NonFiniteError, check_images
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.sharding import is_sharded, shards_line
from trl_tafs.processes import any_process
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.prompts.source import PromptSource, expand_groups
from trl_tafs.rewards.scoring import RewardError, RewardSet, Scores
from trl_tafs.training.checkpoint_files import kept_generators
from trl_tafs.training.logs import EpochLog, Stopwatch, warn_main
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.sampling import RolloutSampler

NUM_IMAGES = 2  # the least that can differ


class HeldOut(Protocol):
    """What an evaluation draws from: held-out prompts, and the rewards that score them."""

    items: list[tuple[str, dict[str, Any]]]
    rewards: RewardSet


@dataclass
class Preflight:
    """Tries a prompt, a small rollout, each reward and the right to push, before anything is spent."""

    config: TrainingOptions
    accelerator: Accelerator
    policy: Policy
    encode: PromptEncoder
    prompts: PromptSource
    rewards: RewardSet
    plan: EpochPlan
    sampler: RolloutSampler
    size: tuple[int, int]  # height and width, pixels
    logs: EpochLog
    held_out: HeldOut | None
    prepare_push: Callable[[], Any]  # raises where the push at the end would fail

    @kept_generators()
    def __call__(self, epoch: int) -> None:
        """Try what the epochs from `epoch` on will need.

        The global generators stay as a checkpoint has them.

        Raises:
            NonFiniteError, PushError, RewardError, ValueError: what would fail later.
        """
        config = self.config
        if config.push_to_hub:
            self.prepare_push()
        if is_sharded(self.policy.accelerator):
            self._say(shards_line(self.policy.pipeline.denoiser))
        prompt, metadata = self.prompts.groups(epoch, 1)[0]
        if config.prompt_cache_dir is not None:
            self.encode.prepare(self.prompts.known())
        self.encode([prompt])
        fault: Exception | None = None
        try:
            images = self._first_images(prompt, metadata, epoch)
            if config.eval_freq and self.held_out is not None:
                self.held_out.rewards.try_once(*self.held_out.items[0], images)
        except (NonFiniteError, RewardError) as error:  # the other processes would wait for this one's rewards
            fault = error
        self._stop_together(fault)
        if epoch == 0 and config.eval_freq == 0 and self.held_out is not None:
            warn_main(self.accelerator, "eval_prompts were given, and eval_freq is 0: nothing will be evaluated")

    def _stop_together(self, fault: Exception | None) -> None:
        """Raise a fault of any process on all of them."""
        if any_process(self.accelerator, fault is not None):
            kind = NonFiniteError if any_process(self.accelerator, isinstance(fault, NonFiniteError)) else RewardError
            raise fault or kind(f"before the first epoch: {kind.__name__} on another process")

    def look(self, prompt: str, metadata: dict[str, Any], epoch: int) -> tuple[Tensor, Scores]:
        """Draw two images of a prompt, in batches no larger than the run's; return them (2, 3, H, W) and their scores.

        Raises:
            NonFiniteError: the denoiser or the VAE made NaN or infinity.
            RewardError: a reward raises, or returns what can't be used.
        """
        batch = expand_groups([(prompt, metadata)], [NUM_IMAGES])
        sampler, size = dataclasses.replace(self.sampler, stopwatch=Stopwatch()), self.config.sample_batch_size
        with self.policy.sampling():
            rollouts = [sampler.roll_out(batch[i : i + size], epoch).rollout for i in range(0, NUM_IMAGES, size)]
        latents = torch.cat([item.final for item in rollouts])
        images = sampler.decode(latents)
        check_images(self.policy.pipeline, images, latents)
        return images, self.rewards.try_once(prompt, metadata, images)

    def _first_images(self, prompt: str, metadata: dict[str, Any], epoch: int) -> Tensor:
        """Return two images that the training rewards have scored: drawn ones, or noise if that isn't wanted."""
        if not self.config.preflight_rollout:
            images = torch.rand(NUM_IMAGES, 3, *self.size, generator=torch.Generator().manual_seed(0))
            self.rewards.try_once(prompt, metadata, images)
            return images
        images, scores = self.look(prompt, metadata, epoch)
        rows = zip(self.rewards.names, scores.values.unbind(1), strict=True)
        told = ", ".join(f"{name} {' and '.join(f'{value:.4g}' for value in row.tolist())}" for name, row in rows)
        self._say(f"two images of {prompt[:60]!r} were drawn and scored: {told}")
        return images

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            say(line)
