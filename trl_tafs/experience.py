"""One epoch's experience: roll out, decode, score, a batch at a time; kept on disk when a reward fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.conditioning import PromptEncoder
from trl_tafs.kernels import Kernel
from trl_tafs.metrics import Stopwatch
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.rewards.scoring import RewardSet, Scores
from trl_tafs.rollout import SampleNoise, Velocity, rollout
from trl_tafs.types import PromptBatch, Rollout


@dataclass
class Part:
    """One sampled batch: its prompts, its rollout, and its rewards once they are there."""

    batch: PromptBatch
    rollout: Rollout
    images: Tensor | None = None  # (B, 3, H, W), what the sampler returned; on the CPU, where a hook wants it
    scores: Tensor | None = None  # (B, Q, K, R)
    metadata: Any = None  # what the rewards said beside

    def payload(self) -> dict[str, Any]:
        """Tensors and plain values, for a file."""
        fields = {f.name: getattr(self.rollout, f.name).cpu() for f in dataclasses.fields(self.rollout)}
        return {"rollout": fields, "scores": self.scores}


@dataclass
class Collector:
    """Algorithm 1, lines 5 to 17, for the batches of one process."""

    pipeline: TAFSPipelineMixin
    kernel: Kernel
    encode: PromptEncoder
    rewards: RewardSet
    velocity: Velocity
    levels: Tensor  # (N + 1,) on the device
    latent_shape: tuple[int, ...]
    scored_steps: range
    reduction: str
    storage_dtype: torch.dtype
    decode_batch_size: int
    share_initial_noise: bool  # one initial noise a group
    keep_images: bool
    reward_threads: int  # 0: rewards are computed between the rollouts
    stopwatch: Stopwatch

    def roll_out(
        self, batch: PromptBatch, seed: int, epoch: int, on_scored: Callable[[Tensor], None] | None = None
    ) -> Part:
        """Sample one batch of trajectories; `on_scored` is given each scored step's latents on the way."""
        device = self.levels.device
        noise = SampleNoise(seed, epoch, tuple(batch.sample_ids.tolist()), device)
        groups = SampleNoise(seed, epoch, tuple(batch.group_ids.tolist()), device)
        initial = groups("shared", 0, self.latent_shape) if self.share_initial_noise else None
        trajectories = rollout(
            self.velocity,
            self.kernel,
            self.encode(batch.prompts),
            self.levels,
            noise("initial", 0, self.latent_shape) if initial is None else initial,
            noise,
            storage_dtype=self.storage_dtype,
            reduction=self.reduction,
            scored_steps=self.scored_steps,
            on_scored=on_scored,
        )
        return Part(batch, trajectories)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W) on the CPU, `decode_batch_size` at a time."""
        return torch.cat([self.pipeline.decode_latents(chunk).cpu() for chunk in latents.split(self.decode_batch_size)])

    def score(self, batch: PromptBatch, latents: Tensor, executor: ThreadPoolExecutor | None = None) -> Future:
        """Decode one step's clean latents (B, K, *) and have them scored: a future of their `Scores`."""
        kinds = latents.shape[1]
        with self.stopwatch("decode"):
            images = self.decode(latents.flatten(0, 1))
        prompts = [prompt for prompt in batch.prompts for _ in range(kinds)]
        metadata = [entry for entry in batch.metadata for _ in range(kinds)]
        if executor is not None:
            return executor.submit(self.rewards, images, prompts, metadata)
        future: Future = Future()
        with self.stopwatch("reward"):
            try:
                future.set_result(self.rewards(images, prompts, metadata))
            except Exception as error:  # handed on through the future, as the executor does
                future.set_exception(error)
        return future

    def sample_and_score(
        self, batch: PromptBatch, seed: int, epoch: int, executor: ThreadPoolExecutor | None
    ) -> tuple[Part, list[Future]]:
        """One batch and a future of each scored step's `Scores`.

        With an executor a step's images are scored while the next step is sampled, else after the last one: the same
        calls with the same images, so that the rewards are the same.
        """
        futures: list[Future] = []
        with self.stopwatch("rollout"):
            on_scored = None if executor is None else lambda x: futures.append(self.score(batch, x, executor))
            part = self.roll_out(batch, seed, epoch, on_scored)
        if executor is None:
            for step in part.rollout.scored.unbind(1):
                futures.append(self.score(batch, step))
                if futures[-1].exception() is not None:
                    break
        if self.keep_images:
            with self.stopwatch("decode"):
                part.images = self.decode(part.rollout.final)
        return part, futures

    def collect(
        self,
        batches: Sequence[PromptBatch],
        seed: int,
        epoch: int,
        kept: Sequence[dict[str, Any]] = (),
        progress: Callable[[str], None] = lambda stage: None,
    ) -> tuple[list[Part], Exception | None]:
        """All of a process's parts, and the first fault of a reward: what came before it is in the parts.

        `kept` are payloads of an earlier try at this epoch, used instead of sampling and scoring again.
        """
        parts, futures, fault = [], [], None
        with ThreadPoolExecutor(self.reward_threads) if self.reward_threads else nullcontext() as executor:
            for i, batch in enumerate(batches):
                if i < len(kept):
                    part, pending = self._restore(batch, kept[i]), []
                    if part.scores is None:
                        pending = [self.score(batch, step, executor) for step in part.rollout.scored.unbind(1)]
                else:
                    part, pending = self.sample_and_score(batch, seed, epoch, executor)
                parts.append(part)
                futures.append(pending)
                progress("rollout")
                if any(future.done() and future.exception() is not None for future in pending):
                    break
        for part, pending in zip(parts, futures, strict=True):
            with self.stopwatch("reward"):
                errors = [future.exception() for future in pending]
            fault = fault or next((error for error in errors if error is not None), None)
            if pending and not any(errors):
                self._attach(part, [future.result() for future in pending])
            progress("reward")
        return parts, fault

    def _attach(self, part: Part, scores: Sequence[Scores]) -> None:
        batch, _, kinds = part.rollout.scored.shape[:3]
        part.scores = torch.stack([step.values.reshape(batch, kinds, -1) for step in scores], dim=1)
        part.metadata = scores[-1].metadata  # of the images that the sampler returned
        part.rollout = dataclasses.replace(part.rollout, scored=part.rollout.scored[:0])  # scored: no longer needed

    def _restore(self, batch: PromptBatch, payload: dict[str, Any]) -> Part:
        device = self.levels.device
        fields = {name: value.to(device) for name, value in payload["rollout"].items()}
        part = Part(batch, Rollout(**fields), scores=payload["scores"], metadata={})
        if self.keep_images:
            part.images = self.decode(part.rollout.final)
        return part
