"""`Preflight`: what is tried before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator

from trl_tafs.policy.policy import Policy
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.prompts.source import PromptSource
from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.training.checkpoint_files import kept_generators
from trl_tafs.training.logs import EpochLog, warn_main
from trl_tafs.training.memory import announce_plan
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan


class HeldOut(Protocol):
    """What an evaluation draws from: held-out prompts, and the rewards that score them."""

    items: list[tuple[str, dict[str, Any]]]
    rewards: RewardSet


@dataclass
class Preflight:
    """Tries one prompt, one call of each reward and the right to push, before anything is spent."""

    config: TrainingOptions
    accelerator: Accelerator
    policy: Policy
    encode: PromptEncoder
    prompts: PromptSource
    rewards: RewardSet
    plan: EpochPlan
    size: tuple[int, int]  # height and width, pixels
    logs: EpochLog
    held_out: HeldOut | None
    prepare_push: Callable[[], Any]  # raises where the push at the end would fail

    @kept_generators()
    def __call__(self, epoch: int) -> None:
        """Try what the epochs from `epoch` on will need; the global generators stay as a checkpoint has them.

        Raises:
            PushError, RewardError, ValueError: it would fail later.
        """
        config = self.config
        if config.push_to_hub:
            self.prepare_push()
        prompt, metadata = self.prompts.groups(epoch, 1)[0]
        if config.prompt_cache_dir is not None:
            self.encode.prepare(self.prompts.known())
        self._plan_memory(prompt)
        self.rewards.try_once(prompt, metadata, *self.size)
        if config.eval_freq and self.held_out is not None:
            prompt, metadata = self.held_out.items[0]
            self.held_out.rewards.try_once(prompt, metadata, *self.size)
        if epoch == 0 and config.eval_freq == 0 and self.held_out is not None:
            warn_main(self.accelerator, "eval_prompts were given, and eval_freq is 0: nothing will be evaluated")

    def _plan_memory(self, prompt: str) -> None:
        conditioning = self.encode([prompt])
        if self.accelerator.is_main_process:
            self.logs.memory_plan = announce_plan(self.policy, conditioning, self.plan.local_images, self.size)
