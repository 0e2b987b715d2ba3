"""From prompts to an epoch's `Experience`, on all processes together; kept on disk when a reward fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from trl_tafs.method.advantages import combine_rewards
from trl_tafs.method.types import PromptBatch, RewardTable
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.processes import any_process, gather_rows, progress_bar, raise_everywhere, same_everywhere, share
from trl_tafs.prompts.source import PromptSource, expand_groups
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.training.experience import Draw, Experience, ScoredBatch
from trl_tafs.training.logs import warn_main
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.pending import PendingRollouts
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.sampling import RolloutSampler


@dataclass
class Collector:
    """Algorithm 1, lines 3 to 17: an epoch's prompts, rollouts and rewards.

    A reward that fails on any process stops all of them with a `RewardError`; the rollouts that were drawn until then
    are kept, and `collect` of the same epoch goes on from them.
    """

    config: TrainingOptions
    accelerator: Accelerator
    sampler: RolloutSampler
    prompts: PromptSource
    plan: EpochPlan
    settings: dict[str, Any]  # those that make what is drawn: kept rollouts of others aren't used

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
            NonFiniteError: the denoiser or the VAE made NaN or infinity, on any process.
        """
        allocation, draws = self.sampler.algorithm.groups, []
        # The main process's prompts: a prompt function with randomness of its own would split the groups.
        groups = same_everywhere(self.accelerator, self.draw_prompts(epoch))
        sizes = allocation.first([prompt for prompt, _ in groups], epoch)
        while sizes is not None:
            prompts = expand_groups(groups, sizes, sum(len(draw.prompts) for draw in draws))
            draws.append(self._draw(prompts, epoch, global_step, draws))
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
        """Drop the kept rollouts of an epoch that is done."""
        if self.accelerator.is_main_process:
            self.pending.drop()

    def local_batches(self, prompts: PromptBatch) -> list[PromptBatch]:
        """Cut this process's share of all images into batches."""
        mine = prompts[share(self.accelerator, len(prompts))]
        return [
            mine[start : start + self.config.sample_batch_size]
            for start in range(0, len(mine), self.config.sample_batch_size)
        ]

    def _draw(self, prompts: PromptBatch, epoch: int, global_step: int, earlier: Sequence[Draw]) -> Draw:
        """Sample and score this process's share, and gather the rewards of all."""
        place = share(self.accelerator, len(prompts))
        key = self._rollout_key(prompts[place], epoch, global_step)
        kept = self.pending.load(epoch, len(earlier), key)
        batches = self.local_batches(prompts)
        options = {"total": len(batches), "leave": False, "position": 1}
        bar = partial(progress_bar, self.accelerator, self.config.disable_tqdm, **options)
        bars = {"rollout": bar(desc="rollout"), "reward": bar(desc="reward")}
        with self.sampler.policy.sampling():
            done, fault = self.sampler.sample(batches, epoch, kept, lambda stage: bars[stage].update())
        for progress in bars.values():
            progress.close()
        if any_process(self.accelerator, fault is not None):
            raise_everywhere(self.accelerator, fault, NonFiniteError, f"epoch {epoch}, step {global_step}")
            self._keep(done, key, fault, epoch, global_step, earlier)
        local_images = torch.arange(place.start, place.stop)
        return Draw(prompts, done, self._gather_rewards(done), local_images)

    def _keep(
        self,
        batches: Sequence[ScoredBatch],
        key: dict[str, Any],
        fault: BaseException | None,
        epoch: int,
        global_step: int,
        earlier: Sequence[Draw],
    ) -> None:
        """Keep the rollouts of this epoch on disk, and raise the fault on every process."""
        keys = [
            self._rollout_key(d.prompts[share(self.accelerator, len(d.prompts))], epoch, global_step) for d in earlier
        ]
        said = self.pending.save(epoch, [*zip(keys, (d.batches for d in earlier), strict=True), (key, batches)])
        reason = fault or "a reward failed on another process"
        raise RewardError(f"epoch {epoch}, step {global_step}: {reason}. {said}") from fault

    def _rollout_key(self, prompts: PromptBatch, epoch: int, global_step: int) -> dict[str, Any]:
        """Return what kept rollouts must have been drawn for to be used."""
        return {
            "epoch": epoch,
            "global_step": global_step,
            "prompts": list(prompts.prompts),
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
