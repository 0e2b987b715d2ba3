"""From prompts to an epoch's `Experience`, on all processes together; kept on disk when a reward fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from trl_tafs.method.advantages import combine_rewards
from trl_tafs.method.types import PromptBatch, RewardTable
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.pipelines.pictures import prompt_key
from trl_tafs.policy.sharding import is_sharded
from trl_tafs.processes import any_process, gather_rows, least, progress_bar, raise_everywhere, same_everywhere, share
from trl_tafs.prompts.source import PromptSource, expand_groups
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.training.experience import Draw, Experience, ScoredBatch
from trl_tafs.training.logs import warn_main
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.pending import PendingRollouts
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.sampling import RolloutSampler
from trl_tafs.training.stopping import Stopped


@dataclass
class Collector:
    """Algorithm 1, lines 3 to 17: an epoch's prompts, rollouts and rewards.

    A reward that fails on any process stops all of them with a `RewardError`, a signal with `Stopped`; the rollouts
    that were drawn until then are kept, and `collect` of the same epoch goes on from them.
    """

    config: TrainingOptions
    accelerator: Accelerator
    sampler: RolloutSampler
    prompts: PromptSource
    plan: EpochPlan
    settings: dict[str, Any]  # those that make what is drawn: kept rollouts of others aren't used
    drawn: list[tuple[dict[str, Any], list[ScoredBatch]]] = field(default_factory=list)  # this epoch's, with their keys

    def __post_init__(self) -> None:
        if self.sampler.algorithm.groups.weights is not None:
            self.prompts.check_fixed()

    @property
    def pending(self) -> PendingRollouts:
        """The rollouts of an interrupted epoch that this process keeps."""
        return PendingRollouts(self.config.project_dir, self.accelerator.process_index)

    def collect(self, epoch: int, global_step: int) -> Experience:
        """Draw and score an epoch's images, at once, or in two draws where the second depends on the first's rewards.

        Raises:
            RewardError: a reward failed, or gave no score for any image; the message says where the rollouts are kept.
            Stopped: a signal came; the message says the same.
            NonFiniteError: the denoiser or the VAE made NaN or infinity, on any process.
        """
        allocation, draws = self.sampler.algorithm.groups, []
        self.drawn = []
        # The main process's prompts: a prompt function with randomness of its own would split the groups.
        groups = same_everywhere(self.accelerator, self.draw_prompts(epoch))
        sizes = allocation.first([prompt for prompt, _ in groups], epoch)
        while sizes is not None:
            prompts = expand_groups(groups, sizes, sum(len(draw.prompts) for draw in draws))
            draws.append(self._draw(prompts, epoch, global_step))
            first = draws[0]
            final = combine_rewards(first.rewards, first.prompts.group_ids)[:, -1].mean(1)
            sizes = allocation.rest(final, first.prompts.group_ids) if len(draws) == 1 else None
        return Experience.of(draws)

    def draw_prompts(self, epoch: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the (prompt, metadata) of each of an epoch's groups: in turn, or by the allocation's weights."""
        weigh = self.sampler.algorithm.groups.weights
        if weigh is None:
            return self.prompts.groups(epoch, self.plan.num_groups)
        return self.prompts.by_weight(epoch, self.plan.num_groups, weigh)

    def forget(self) -> None:
        """Drop the rollouts of an epoch that is done."""
        self.drawn = []
        if self.accelerator.is_main_process:
            self.pending.drop()

    def local_batches(self, prompts: PromptBatch) -> list[PromptBatch]:
        """Cut this process's share of all images into batches."""
        mine = prompts[share(self.accelerator, len(prompts))]
        return [
            mine[start : start + self.config.sample_batch_size]
            for start in range(0, len(mine), self.config.sample_batch_size)
        ]

    def keep(self, epoch: int) -> str:
        """Keep on disk what this process has drawn of the epoch; return a sentence that says where, or why not."""
        if not any(batches for _, batches in self.drawn):
            return "Nothing of the epoch had been drawn"
        return self.pending.save(epoch, self.drawn)

    def _draw(self, prompts: PromptBatch, epoch: int, global_step: int) -> Draw:
        """Sample and score this process's share, and gather the rewards of all."""
        place = share(self.accelerator, len(prompts))
        key = self._rollout_key(prompts[place], epoch, global_step)
        kept = self.pending.load(epoch, len(self.drawn), key)
        if is_sharded(self.accelerator):  # the rest is drawn together
            kept = kept[: least(self.accelerator, len(kept))]
        batches = self.local_batches(prompts)
        options = {"total": len(batches), "leave": False, "position": 1}
        bar = partial(progress_bar, self.accelerator, self.config.disable_tqdm, **options)
        bars = {"rollout": bar(desc="rollout"), "reward": bar(desc="reward")}
        with self.sampler.policy.sampling():
            done, fault = self.sampler.sample(batches, epoch, kept, lambda stage: bars[stage].update())
        for progress in bars.values():
            progress.close()
        self.drawn.append((key, done))
        if any_process(self.accelerator, fault is not None):
            raise_everywhere(self.accelerator, fault, NonFiniteError, f"epoch {epoch}, step {global_step}")
            self._interrupt(fault, epoch, global_step)
        local_images = torch.arange(place.start, place.stop)
        return Draw(prompts, done, self._gather_rewards(done), local_images)

    def _interrupt(self, fault: BaseException | None, epoch: int, global_step: int) -> None:
        """Keep the rollouts of this epoch on disk, and raise the fault on every process."""
        said, stopped = self.keep(epoch), isinstance(fault, Stopped)
        if not any_process(self.accelerator, fault is not None and not stopped):
            raise Stopped(said)
        reason = "a reward failed on another process" if fault is None or stopped else fault
        raise RewardError(f"epoch {epoch}, step {global_step}: {reason}. {said}") from fault

    def _rollout_key(self, prompts: PromptBatch, epoch: int, global_step: int) -> dict[str, Any]:
        """Return what kept rollouts must have been drawn for to be used."""
        return {
            "epoch": epoch,
            "global_step": global_step,
            "prompts": [prompt_key(prompt) for prompt in prompts.prompts],
            "settings": self.settings,
            "rewards": len(self.sampler.rewards.names),
        }

    def _gather_rewards(self, batches: Sequence[ScoredBatch]) -> RewardTable:
        """Return all processes' rewards, (B, Q, K, R), in the order of the sample ids."""
        rewards = self.sampler.rewards
        values = gather_rows(self.accelerator, torch.cat([batch.scores for batch in batches]))
        if values.isnan().all():
            raise RewardError(
                f"the rewards ({', '.join(rewards.names)}) gave no score (None or NaN) for any of the epoch's "
                f"{values[..., 0].numel()} images; check them on one image first"
            )
        for name, column in zip(rewards.names, values.unbind(-1), strict=True):
            if column.isnan().all():
                warn_main(self.accelerator, f"reward {name} gave no score for any image of an epoch; it has no effect")
        return RewardTable(values, rewards.names, rewards.weights)
