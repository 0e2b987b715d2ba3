"""Algorithm 1, lines 20 and 21: an epoch's rollouts and advantages into optimizer steps."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.method.noise import SampleNoise, noise_seed
from trl_tafs.method.objectives import Objective
from trl_tafs.method.rollout import Velocity
from trl_tafs.method.types import Conditioning, LossOutput, Rows
from trl_tafs.policy.copies import AdapterAverage, OldPolicy
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.training.collector import Part
from trl_tafs.training.logs import MeanMetrics
from trl_tafs.training.plan import EpochPlan


@dataclass
class Updater:
    """Owns what an optimizer step moves: parameters, optimizer, learning rate, average."""

    config: TAFSGRPOConfig
    plan: EpochPlan
    accelerator: Accelerator
    model: nn.Module  # prepared
    parameters: list[nn.Parameter]
    optimizer: Any
    lr_scheduler: Any
    average: AdapterAverage | None
    old_policy: OldPolicy | None
    objective: Objective
    encode: PromptEncoder
    velocity: Velocity  # of the present policy
    loss: Callable[[Any, Conditioning], LossOutput]  # of one micro-batch

    def rows(self, parts: Sequence[Part], advantages: Tensor, epoch: int) -> Any:
        """The objective's rows of all parts; advantages (B, S, M)."""
        sizes = [len(part.batch) for part in parts]
        rows, offset = [], 0
        for part, advantage in zip(parts, advantages.split(sizes), strict=True):
            noise = SampleNoise(
                self.config.seed, epoch, tuple(part.batch.sample_ids.tolist()), part.rollout.final.device
            )
            item = self.objective.rows(part.rollout, advantage.to(part.rollout.final.device), noise)
            rows.append(dataclasses.replace(item, sample=item.sample + offset).to(self.accelerator.device))
            offset += len(part.batch)
        return type(rows[0]).cat(rows)

    def run(
        self,
        parts: Sequence[Part],
        advantages: Tensor,
        epoch: int,
        on_step: Callable[[MeanMetrics, int], None],
        progress: Callable[[], Any] = lambda: None,
    ) -> None:
        """All inner epochs over one epoch's experience; `on_step(metrics, inner_epoch)` after each optimizer step."""
        # Accelerate shares this count between all accelerators of a process, and an interrupt leaves it in the middle.
        self.accelerator.gradient_accumulation_steps = self.plan.micro_batches_per_update
        self.accelerator.step = 0
        for parameter in self.parameters:
            parameter.grad = None
        rows = self.rows(parts, advantages, epoch)
        by_image = [prompt for part in parts for prompt in part.batch.prompts]
        prompts = [by_image[image] for image in rows.sample.tolist()]  # a row's, looked up once and on the host
        if self.old_policy is not None or self.config.train_num_inner_epochs * self.plan.updates_per_inner_epoch > 1:
            rows = self._observe(rows, prompts)
        metrics = MeanMetrics()
        for inner_epoch in range(self.config.train_num_inner_epochs):
            for index, idle in self.micro_batches(rows, epoch, inner_epoch):
                with self.accelerator.accumulate(self.model):
                    if not idle or self.accelerator.sync_gradients:
                        self._backward(
                            rows[index.to(rows.sample.device)], [prompts[i] for i in index.tolist()], metrics
                        )
                    self._step(metrics)
                progress()
                if self.accelerator.sync_gradients:
                    on_step(metrics, inner_epoch)

    def _observe(self, rows: Any, prompts: Sequence[str]) -> Any:
        """What the objective needs of the policy that sampled, before the first update moves the present one."""
        size = self.config.train_batch_size
        with nullcontext() if self.old_policy is None else self.old_policy.applied():
            chunks = [
                self.objective.observe(self.velocity, rows[i : i + size], self.encode(prompts[i : i + size]))
                for i in range(0, len(rows), size)
            ]
        return type(rows).cat(chunks)

    def micro_batches(self, rows: Any, epoch: int, inner_epoch: int) -> Iterator[tuple[Tensor, bool]]:
        """Row indices of each micro-batch, on the CPU, and whether nothing in it can move the policy.

        Images are shuffled, each with `train_timestep_fraction` of its rows. What carries no advantage (a group
        without variance, no verdict) comes first in an optimizer step, where whole micro-batches of it are skipped.
        """
        config, count = self.config, self.config.rows_per_image
        key = noise_seed(config.seed, epoch, self.accelerator.process_index, "shuffle", inner_epoch)
        generator = torch.Generator().manual_seed(key)
        images = torch.randperm(self.plan.local_images, generator=generator)
        chosen = torch.rand(len(images), count, generator=generator).argsort(1)[:, : config.num_replayed_rows]
        idle = self.objective.idle(rows).cpu()
        for update in images.split(self.plan.images_per_update):
            index = (update[:, None] * count + chosen[update]).flatten()
            index = index[idle[index].int().argsort(descending=True, stable=True)]
            for micro in index.split(config.train_batch_size):
                yield micro, bool(idle[micro].all())

    def _backward(self, rows: Rows, prompts: Sequence[str], metrics: MeanMetrics) -> None:
        output = self.loss(rows, self.encode(prompts))
        self.accelerator.backward(output.loss)
        metrics.add(output.metrics | {"loss": output.loss})

    def _step(self, metrics: MeanMetrics) -> None:
        """An optimizer step where gradients are complete; Accelerate makes it nothing where they aren't."""
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.train_max_grad_norm)
            norm = torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)
            metrics.last["grad_norm"] = norm
            if self.accelerator.scaler is None and not torch.isfinite(norm):  # with fp16 the scaler sees to it
                warnings.warn(f"the gradient's norm is {norm.item()}: this optimizer step is left out", stacklevel=2)
                self.optimizer.zero_grad()
                return
        self.optimizer.step()
        if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad()
