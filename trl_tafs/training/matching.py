"""Distribution matching in an update: the teacher, the fake score, and which of the policy's estimates they see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from trl_tafs.method.distribution import DistributionMatching, fake_loss, renoised
from trl_tafs.method.guidance import is_guided
from trl_tafs.method.kernels import clean_estimate
from trl_tafs.method.types import Conditioning, LossOutput
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.policy.policy import Evaluation, Policy
from trl_tafs.prompts.encoder import PromptEncoder, encoder_for
from trl_tafs.training.experience import Experience
from trl_tafs.training.logs import MeanMetrics
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Estimates:
    """Clean estimates of the policy, and whose they are."""

    clean: Tensor  # (T, *) float32, without gradient
    images: list[int]  # T, places among this process's images of the epoch
    prompts: list[str]  # T
    keys: list[Key]  # T, of their noise


def teacher_guidance(config: TrainingOptions, pipeline: TAFSPipelineMixin) -> float:
    """Return the scale of the teacher's classifier-free guidance, 1 where it has none."""
    return config.teacher_guidance(has_own_guidance(config, pipeline))


def has_own_guidance(config: TrainingOptions, pipeline: TAFSPipelineMixin) -> bool:
    """Return whether guidance is distilled into a model, as an input or for good."""
    embedded = pipeline.embedded_guidance(config.sample_embedded_guidance_scale)
    return embedded is not None or not pipeline.has_guidance


@dataclass
class Matching:
    """Adds distribution matching to the loss of a micro-batch, and trains the fake score after each optimizer step.

    Args:
        config: which estimates are matched, and how the fake score learns.
        policy: with its reference, the teacher, and its fake score.
        formula: the term.
        encode: of prompts, for the policy and the fake score.
        encode_teacher: of prompts, with the teacher's guidance.
    """

    config: TrainingOptions
    policy: Policy
    formula: DistributionMatching
    encode: PromptEncoder
    encode_teacher: PromptEncoder
    waiting: list[Estimates] = field(default_factory=list)  # for the fake score, since the policy's last step
    images: list[tuple[int, str]] = field(default_factory=list)  # sample id and prompt of this process's images
    last: tuple[Tensor, Tensor] | None = None  # (b, *) and (), their x_N and its level, where it is matched
    epoch: int = 0

    @classmethod
    def of(
        cls, config: TrainingOptions, policy: Policy, formula: DistributionMatching | None, encode: PromptEncoder
    ) -> Self | None:
        """Make what the configuration asks for; None without distribution matching."""
        if formula is None:
            return None
        return cls(config, policy, formula, encode, encoder_for(encode, teacher_guidance(config, policy.pipeline)))

    def begin(self, experience: Experience, epoch: int) -> None:
        """Look at an epoch's images; what an interrupted update left is forgotten."""
        self.waiting, self.epoch, device = [], epoch, self.policy.accelerator.device
        batches = [(batch.prompts, batch.rollout) for batch in experience.batches]
        self.images = [pair for b, _ in batches for pair in zip(b.sample_ids.tolist(), b.prompts, strict=True)]
        if self.config.dm_rows == "final":
            states = torch.cat([rollout.last[:, 0].to(device) for _, rollout in batches])
            self.last = states, batches[0][1].levels[-2].to(device)
        for prompt in dict.fromkeys(prompt for _, prompt in self.images):  # now, while no graph holds the denoiser
            self.encode_teacher([prompt])

    def __call__(
        self,
        loss: Callable[[Any, Conditioning], LossOutput],
        items: Any,
        index: Tensor,
        inner_epoch: int,
        plan: EpochPlan,
    ) -> LossOutput:
        """Return the loss of one micro-batch with the term beside it, (a share of) the mean of an optimizer step's.

        Args:
            loss: the objective's.
            items: its T.
            index: (T,) int64 on the CPU, their places among all items of the epoch.
            inner_epoch: a part of the key of the noise.
            plan: of the epoch, whose optimizer step the micro-batch is a part of.
        """
        places = [divmod(place, self.config.rows_per_image) for place in index.tolist()]
        with self.policy.recording() as seen:
            output = loss(items, self.encode([self.images[image][1] for image, _ in places]))
        rows = self._final_rows(places) if self.config.dm_rows == "final" else places
        if not rows:
            return output
        images, prompts = [image for image, _ in rows], [self.images[image][1] for image, _ in rows]
        keys = [(self.config.seed, self.epoch, self.images[i][0], "matching", row, inner_epoch) for i, row in rows]
        estimate = self._estimate(images, prompts, seen)
        self.waiting.append(Estimates(estimate.detach(), images, prompts, keys))
        first = [(*key, 0) for key in keys]
        term, metrics = self.formula(estimate, first, self._teacher(prompts), self._fake(prompts))
        share = len(rows) * plan.micro_batches_per_update / self._rows_per_update(plan)
        metrics = {name: share * value for name, value in metrics.items()}
        return LossOutput(output.loss + share * term, output.metrics | metrics)

    def _final_rows(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return those of the images that no earlier micro-batch of the optimizer step had, with the last step."""
        before = {image for rows in self.waiting for image in rows.images}
        found = dict.fromkeys(image for image, _ in places if image not in before)
        return [(image, self.config.sample_num_steps - 1) for image in found]

    def _rows_per_update(self, plan: EpochPlan) -> int:
        rows = 1 if self.config.dm_rows == "final" else self.config.num_replayed_rows
        return plan.images_per_update * rows

    def _estimate(self, images: list[int], prompts: list[str], seen: Sequence[Evaluation]) -> Tensor:
        """Return the policy's clean estimates, (T, *) float32 with gradient."""
        if self.last is not None:
            state, level = self.last[0][images], self.last[1].expand(len(images))
            v = self.policy.velocity(state, level, self.encode(prompts))
            return clean_estimate(state.float(), v, level)
        found = next((item for item in seen if len(item.state) == len(images)), None)
        if found is None:
            raise ValueError(
                f"objective={self.config.objective!r} didn't evaluate the policy at its {len(images)} items, whose "
                "clean estimates distribution matching takes; use dm_rows='final'"
            )
        return clean_estimate(found.state.float(), found.velocity, found.level)

    def _teacher(self, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
        conditioning, dtype = self.encode_teacher(prompts), self.policy.storage_dtype
        return lambda x, level: self.policy.reference(x.to(dtype), level, conditioning)

    def _fake(self, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the fake score's velocity, which is switched on by it alone; without guidance."""
        evaluate, fake = self._fake_velocity(prompts), self.policy.fake

        def velocity(x: Tensor, level: Tensor) -> Tensor:
            with fake.acting():
                return evaluate(x, level)

        return velocity

    def _fake_velocity(self, prompts: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
        policy, dtype = self.policy, self.policy.storage_dtype
        conditioning = dataclasses.replace(self.encode(prompts), negative=None, guidance_scale=1.0)
        return lambda x, level: policy.evaluate(x.to(dtype), level, conditioning)

    def teach(self, metrics: MeanMetrics, plan: EpochPlan) -> None:
        """Take the fake score's optimizer steps, on the estimates that the policy's step was made from.

        Raises:
            NonFiniteError: its gradient isn't finite, for too many steps in a row.
        """
        accelerator, fake = self.policy.accelerator, self.policy.fake
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        for update in range(1, self.config.dm_fake_updates + 1):
            loss = self._learn(update, scale)
            norm = fake.step(accelerator, scale)
            if fake.skipped >= self.config.max_skipped_steps:
                raise NonFiniteError(
                    f"epoch {self.epoch}: {fake.skipped} optimizer steps of the fake score in a row were left out, "
                    f"since their gradient isn't finite (the loss is {loss.item()}); lower dm_fake_learning_rate "
                    f"({self.config.fake_learning_rate:g}) or train_learning_rate"
                )
        self.waiting = []
        metrics.last |= {"fake_loss": loss, "fake_grad_norm": norm.detach()} | self._evaluations(plan, loss)

    def _learn(self, update: int, scale: float) -> Tensor:
        """Add up the gradients of the fake score's loss on all that waits, at fresh noise; return the loss, ()."""
        total = sum(len(rows.keys) for rows in self.waiting)
        loss = torch.zeros((), device=self.policy.accelerator.device)
        with self.policy.fake.acting(learning=True):
            for rows in self.waiting:
                noised = renoised(rows.clean, [(*key, update) for key in rows.keys], self.formula.level_shift)
                v = self._fake_velocity(rows.prompts)(noised.state, noised.level)
                part = fake_loss(v, noised, rows.clean).sum() / total
                (scale * part).backward()
                loss += part.detach()
        return loss

    def _evaluations(self, plan: EpochPlan, like: Tensor) -> dict[str, Tensor]:
        """Return how often teacher and fake score are evaluated for each image of an optimizer step."""
        rows = self._rows_per_update(plan) / plan.images_per_update
        halves = 2 if is_guided(self.encode_teacher.arguments["guidance_scale"]) else 1
        counts = {"teacher": halves * rows, "fake": (1 + self.config.dm_fake_updates) * rows}
        return {f"dm_{name}_evaluations": like.new_tensor(count) for name, count in counts.items()}
