"""One epoch's experience: roll out, decode, score, a batch at a time; kept on disk when a reward fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_tafs.method.kernels import Kernel
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import Velocity, rollout
from trl_tafs.method.types import PromptBatch, RewardTable, Rollout
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.rewards.scoring import RewardSet, Scores
from trl_tafs.training.logs import Stopwatch


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
class Wave:
    """What is drawn together: all of an epoch's images, or with streaming groups the first or the second share."""

    prompts: PromptBatch  # of all processes
    parts: list[Part]  # of this one
    table: RewardTable  # of all processes, (B, Q, K, R)


@dataclass
class Scoring:
    """A part's scores on their way."""

    futures: list[Future] = field(default_factory=list)  # of the `Scores` of each scored step
    images: Tensor | None = None  # (B, 3, H, W) the latest step's of the first kind, where a hook wants images

    @property
    def done(self) -> bool:
        """Whether all are there."""
        return all(future.done() for future in self.futures)

    @property
    def fault(self) -> BaseException | None:
        """The first error of those that are there."""
        errors = (future.exception() for future in self.futures if future.done())
        return next((error for error in errors if error is not None), None)


@dataclass
class Collector:
    """Algorithm 1, lines 5 to 17, for the batches of one process."""

    pipeline: TAFSPipelineMixin
    kernel_at: Callable[[int], Kernel]  # of an epoch
    encode: PromptEncoder
    rewards: RewardSet
    velocity: Velocity
    levels: Tensor  # (N + 1,) on the device
    latent_shape: tuple[int, ...]
    scored_steps_at: Callable[[int], range]  # of an epoch
    reduction: str
    storage_dtype: torch.dtype
    decode_batch_size: int
    share_initial_noise: bool  # one initial noise a group
    keep_images: bool
    reward_threads: int  # 0: rewards are computed between the rollouts
    take_turns: bool  # all is drawn before anything is decoded and scored
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
            self.kernel_at(epoch),
            self.encode(batch.prompts),
            self.levels,
            noise("initial", 0, self.latent_shape) if initial is None else initial,
            noise,
            storage_dtype=self.storage_dtype,
            reduction=self.reduction,
            scored_steps=self.scored_steps_at(epoch),
            on_scored=on_scored,
        )
        return Part(batch, trajectories)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W) on the CPU, `decode_batch_size` at a time."""
        return self.pipeline.decode_in_batches(latents, self.decode_batch_size)

    def score(
        self, batch: PromptBatch, latents: Tensor, scoring: Scoring, executor: ThreadPoolExecutor | None = None
    ) -> None:
        """Decode one step's clean latents (B, K, *) and have them scored: a future of their `Scores` is added."""
        kinds = latents.shape[1]
        with self.stopwatch("decode"):
            images = self.decode(latents.flatten(0, 1))
        if self.keep_images:
            scoring.images = images[::kinds].clone()
        prompts = [prompt for prompt in batch.prompts for _ in range(kinds)]
        metadata = [entry for entry in batch.metadata for _ in range(kinds)]
        if executor is not None:
            scoring.futures.append(executor.submit(self.rewards, images, prompts, metadata))
            return
        future: Future = Future()
        scoring.futures.append(future)
        with self.stopwatch("reward"):
            try:
                future.set_result(self.rewards(images, prompts, metadata))
            except Exception as error:  # handed on through the future, as the executor does
                future.set_exception(error)

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
        parts: list[Part] = []
        waiting: list[tuple[Part, Scoring]] = []
        fault: BaseException | None = None

        def settle() -> None:
            """Take the scores of the parts that have them, in order; their scored latents are free then."""
            nonlocal fault
            while waiting and waiting[0][1].done:
                part, scoring = waiting.pop(0)
                fault = fault or scoring.fault
                if scoring.futures and scoring.fault is None:
                    self._attach(part, [future.result() for future in scoring.futures])
                progress("reward")

        with ThreadPoolExecutor(self.reward_threads) if self.reward_threads else nullcontext() as executor:
            drawn = self._drawn(batches, seed, epoch, kept, progress, executor)
            # Where models take turns on the GPU, all is drawn before anything is scored: one exchange an epoch.
            drawn = list(drawn) if self.take_turns else drawn
            with self.pipeline.decoding() if self.take_turns else nullcontext():
                for part, scoring in drawn:
                    parts.append(part)
                    self._score_steps(part, scoring, executor)
                    waiting.append((part, scoring))
                    settle()
                    if fault is not None or scoring.fault is not None:
                        break
            with self.stopwatch("reward"):  # what sampling didn't hide
                wait([future for _, scoring in waiting for future in scoring.futures])
        settle()
        return parts, fault

    def _drawn(
        self,
        batches: Sequence[PromptBatch],
        seed: int,
        epoch: int,
        kept: Sequence[dict[str, Any]],
        progress: Callable[[str], None],
        executor: ThreadPoolExecutor | None,
    ) -> Iterator[tuple[Part, Scoring]]:
        """The parts, one after the other: restored where they were kept, or sampled.

        With an executor a step's images are scored while the next step is sampled, and their futures are here; without
        one they are scored later: the same calls with the same images, so that the rewards are the same.
        """
        for i, batch in enumerate(batches):
            scoring = Scoring()
            if i < len(kept):
                part = self._restore(batch, kept[i])
            else:
                with self.stopwatch("rollout"):
                    part = self.roll_out(batch, seed, epoch, self._scorer(batch, scoring, executor))
            progress("rollout")
            yield part, scoring

    def _scorer(
        self, batch: PromptBatch, scoring: Scoring, executor: ThreadPoolExecutor | None
    ) -> Callable[[Tensor], None] | None:
        """What `rollout` hands a step's clean latents to."""
        return None if executor is None else lambda latents: self.score(batch, latents, scoring, executor)

    def _score_steps(self, part: Part, scoring: Scoring, executor: ThreadPoolExecutor | None) -> None:
        """Have each scored step scored, where that hasn't begun and scores aren't there; and the hook's images."""
        if part.scores is None and not scoring.futures:
            for latents in part.rollout.scored.unbind(1):
                self.score(part.batch, latents, scoring, executor)
                if executor is None and scoring.fault is not None:
                    break
        if self.keep_images:
            part.images = scoring.images if self._shows_result(part, scoring) else None
        if self.keep_images and part.images is None:
            with self.stopwatch("decode"):
                part.images = self.decode(part.rollout.final)

    def _shows_result(self, part: Part, scoring: Scoring) -> bool:
        """Whether the last image that was scored is what the sampler returned, up to the storage dtype's rounding."""
        if len(scoring.futures) != part.rollout.scored.shape[1] or not len(part.rollout.scored):
            return False
        return torch.equal(
            part.rollout.scored[:, -1, 0].to(self.storage_dtype), part.rollout.final.to(self.storage_dtype)
        )

    def _attach(self, part: Part, scores: Sequence[Scores]) -> None:
        batch, _, kinds = part.rollout.scored.shape[:3]
        part.scores = torch.stack([step.values.reshape(batch, kinds, -1) for step in scores], dim=1)
        part.metadata = scores[-1].metadata  # of the images that the sampler returned
        # no longer needed; an empty view would keep all of them
        part.rollout = dataclasses.replace(part.rollout, scored=part.rollout.scored[:0].clone())

    def _restore(self, batch: PromptBatch, payload: dict[str, Any]) -> Part:
        device = self.levels.device
        fields = {name: value.to(device) for name, value in payload["rollout"].items()}
        return Part(batch, Rollout(**fields), scores=payload["scores"], metadata={})
