"""Algorithm 1, lines 20 and 21: an epoch's experience and advantages into optimizer steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.method.noise import SampleNoise, noise_seed
from trl_tafs.method.objective import Objective
from trl_tafs.method.types import Conditioning, KLRows, LossOutput, onto
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.sharding import is_sharded
from trl_tafs.processes import progress_bar
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.training.divergence import check_advantages, check_skipped, check_weights
from trl_tafs.training.experience import Experience, ScoredBatch
from trl_tafs.training.logs import MeanMetrics, Stopwatch, warn_main
from trl_tafs.training.matching import Matching
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.progress import Progress
from trl_tafs.training.stopping import Stopped

ASKED_TOGETHER = 8  # micro-batches: each time several processes ask whether to stop, the host waits for the GPU


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured on this process."""

    inner_epoch: int
    values: dict[str, Tensor]  # means over the step's micro-batches, () each, on their device


@dataclass
class Updater:
    """Turns an epoch's rollouts into optimizer steps of the policy."""

    config: TrainingOptions
    plan: EpochPlan
    policy: Policy
    objective: Objective
    encode: PromptEncoder
    loss: Callable[[Any, Conditioning], LossOutput]  # of one micro-batch
    stopwatch: Stopwatch
    progress: Progress  # counts the optimizer steps that are left out
    stop: Callable[[], bool] = lambda: False  # whether to stop, on all processes alike
    matching: Matching | None = None  # distribution matching beside the loss
    held: Tensor | None = None  # (T,) bool on the CPU, the items of an inner epoch whose distance to the base is taken

    def update(self, experience: Experience, advantages: Tensor, epoch: int) -> Iterator[StepMetrics]:
        """Yield the metrics of each optimizer step, over all inner epochs; none where nothing can move the policy.

        Args:
            experience: the epoch's.
            advantages: (B, S, M) of the images of all processes.
            epoch: the key of the shuffles.

        Raises:
            Stopped: a signal came; the policy is in the middle of the epoch.
            NonFiniteError: the advantages aren't finite, nor the weights after the update, or too many optimizer steps
                in a row were left out.
        """
        check_advantages(advantages, self.config, f"epoch {epoch}")
        accelerator, plan = self.policy.accelerator, self.plan
        # Accelerate shares this count between all accelerators of a process, and an interrupt leaves it in the middle.
        accelerator.gradient_accumulation_steps = plan.micro_batches_per_update
        accelerator.step = 0
        inner_epochs = self.config.train_num_inner_epochs
        total = inner_epochs * plan.updates_per_inner_epoch * plan.micro_batches_per_update
        options = {"total": total, "desc": "update", "leave": False, "position": 1}
        bar = progress_bar(accelerator, self.config.disable_tqdm, **options)
        with bar, self.stopwatch("update"), self.policy.updating():
            items = self.minibatch_items(experience.batches, experience.local(advantages), epoch)
            by_image = [prompt for batch in experience.batches for prompt in batch.prompts.prompts]
            prompts = [by_image[image] for image in items.sample.tolist()]  # an item's, looked up once and on the host
            if self.policy.old is not None or inner_epochs * plan.updates_per_inner_epoch > 1:
                items = self._with_old_policy(items, prompts)
            metrics = MeanMetrics()
            if self.matching is not None:
                self.matching.begin(experience, epoch)
            # Without any advantage on any process, and any other pull, a step would be Adam's momentum alone.
            idle = not advantages.any() and self._still_together([bool(self._still(items).all())])[0]
            for inner_epoch in range(0 if idle else inner_epochs):
                for number, (index, still) in enumerate(self.micro_batches(items, epoch, inner_epoch)):
                    if number % self._asks_every == 0 and self.stop():
                        raise Stopped
                    with accelerator.accumulate(self.policy.model):
                        if not still or accelerator.sync_gradients:
                            output = self._output(items, prompts, index, inner_epoch)
                            accelerator.backward(output.loss)
                            metrics.add(output.metrics | {"loss": output.loss})
                        self._step(metrics, epoch)
                    bar.update()
                    if accelerator.sync_gradients:
                        yield StepMetrics(inner_epoch, metrics.pop())
        check_weights(self.policy, self.config, f"epoch {epoch}")

    @property
    def _asks_every(self) -> int:
        """Micro-batches between two questions whether to stop, which several processes answer together."""
        return 1 if self.policy.accelerator.num_processes == 1 else ASKED_TOGETHER

    def minibatch_items(self, batches: Sequence[ScoredBatch], advantages: Tensor, epoch: int) -> Any:
        """Return the objective's items of all batches; advantages (b, S, M).

        Raises:
            ValueError: the objective made another number of items an image than it says.
        """
        found, offset = [], 0
        for batch, part in zip(batches, advantages.split([len(b.prompts) for b in batches]), strict=True):
            device, ids = batch.rollout.final.device, tuple(batch.prompts.sample_ids.tolist())
            noise = SampleNoise(self.config.seed, epoch, ids, device)
            items = self.objective.items(batch.rollout, part.to(device), noise)
            items = dataclasses.replace(items, sample=items.sample + offset)
            found.append(items.to(self.policy.accelerator.device))
            offset += len(batch.prompts)
        items = type(found[0]).cat(found)
        expected = self.config.rows_per_image
        if len(items.sample) != offset * expected:
            raise ValueError(
                f"objective={self.config.objective!r} made {len(items.sample)} minibatch items of {offset} images, and "
                f"says that it makes {expected} an image; correct its rows_per_image or its items"
            )
        return items

    def micro_batches(self, items: Any, epoch: int, inner_epoch: int) -> Iterator[tuple[Tensor, bool]]:
        """Yield the indices of each micro-batch's items, on the CPU, and whether none of them can move the policy.

        Images are shuffled, each with `train_timestep_fraction` of its items. What carries no advantage (a group
        without variance, no score) comes first in an optimizer step, where whole micro-batches of it are skipped.
        """
        config, count = self.config, self.config.rows_per_image
        key = noise_seed(config.seed, epoch, self.policy.accelerator.process_index, "shuffle", inner_epoch)
        generator = torch.Generator().manual_seed(key)
        images = torch.randperm(self.plan.local_images, generator=generator)
        chosen = torch.rand(len(images), count, generator=generator).argsort(1)[:, : config.num_replayed_rows]
        still = self._still(items).cpu()
        if config.train_kl_rows == "one":
            self.held = torch.zeros(len(items), dtype=torch.bool)
            self.held[torch.arange(len(images)) * count + chosen[:, 0]] = True
        found = []
        for update in images.split(self.plan.images_per_update):
            index = (update[:, None] * count + chosen[update]).flatten()
            index = index[still[index].int().argsort(descending=True, stable=True)]
            found += index.split(config.train_batch_size)
        yield from zip(found, self._still_together([bool(still[micro].all()) for micro in found]), strict=True)

    def _still_together(self, still: list[bool]) -> list[bool]:
        """Return which micro-batches are skipped: where all processes evaluate together, those that all skip."""
        if not is_sharded(self.policy.accelerator):
            return still
        accelerator = self.policy.accelerator
        moving = accelerator.reduce(torch.tensor([not flag for flag in still], device=accelerator.device).int())
        return (moving == 0).tolist()

    def _still(self, items: Any) -> Tensor:
        """Return which items can't move the policy, (T,) bool; distribution matching pulls at all of them."""
        still = self.objective.without_gradient(items)
        return still if self.matching is None else torch.zeros_like(still)

    def _with_old_policy(self, items: Any, prompts: Sequence[str]) -> Any:
        """Add what the objective needs of the policy that sampled, before the first update moves the present one."""
        size = self.config.train_batch_size
        with self.policy.sampling():
            chunks = [
                self.objective.with_old_policy(
                    self.policy.velocity, items[i : i + size], self.encode(prompts[i : i + size])
                )
                for i in range(0, len(items), size)
            ]
        return type(items).cat(chunks)

    def _output(self, items: Any, prompts: Sequence[str], index: Tensor, inner_epoch: int) -> LossOutput:
        """Return the loss of the micro-batch of the items at `index`, of all `items` with all `prompts`."""
        micro = items[onto(index, items.sample.device)]
        if self.held is not None:
            rows, weight = self.held[index].nonzero().flatten().tolist(), float(self.config.num_replayed_rows)
            micro = dataclasses.replace(micro, kl_rows=KLRows(tuple(rows), weight))
        if self.matching is not None:
            return self.matching(self.loss, micro, index, inner_epoch, self.plan)
        return self.loss(micro, self.encode([prompts[i] for i in index.tolist()]))

    def _step(self, metrics: MeanMetrics, epoch: int) -> None:
        """Take an optimizer step where gradients are complete and finite."""
        accelerator, policy = self.policy.accelerator, self.policy
        if not accelerator.sync_gradients:
            policy.step()
            return
        norm = policy.clip_gradients()
        metrics.last["grad_norm"] = norm
        if accelerator.scaler is None and not torch.isfinite(norm):
            policy.optimizer.zero_grad()
            skipped = True
        else:
            policy.step()
            skipped = accelerator.optimizer_step_was_skipped  # with fp16 the scaler sees to it
        if self.matching is not None:
            self.matching.teach(metrics, self.plan)
        self.progress.skipped_steps = self.progress.skipped_steps + 1 if skipped else 0
        if skipped:
            self._count_skipped(norm.item(), metrics, epoch)

    def _count_skipped(self, norm: float, metrics: MeanMetrics, epoch: int) -> None:
        """Log that an optimizer step was left out; raise NonFiniteError after too many."""
        skipped, loss = self.progress.skipped_steps, metrics.mean("loss")
        metrics.last["skipped_steps"] = torch.tensor(float(skipped), device=self.policy.accelerator.device)
        if self.policy.accelerator.scaler is None:  # a scaler's first ones are its search for a size
            warn_main(
                self.policy.accelerator,
                f"epoch {epoch}: the gradient's norm is {norm}: this optimizer step is left out (the loss is {loss}; "
                f"{skipped} in a row, and the run stops at train_max_skipped_steps={self.config.max_skipped_steps})",
            )
        check_skipped(skipped, norm, loss, self.config, f"epoch {epoch}")
