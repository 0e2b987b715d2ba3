"""One process's batches of an epoch: roll out, decode, score, one batch at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_tafs.algorithm import Algorithm
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import LAST, rollout
from trl_tafs.method.types import PromptBatch, Rollout
from trl_tafs.pipelines.components import casting_once
from trl_tafs.pipelines.finite import DenoiserWatch, NonFiniteError, check_images
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.sharding import is_sharded
from trl_tafs.processes import any_process
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.rewards.scoring import RewardSet, Scores
from trl_tafs.training.decoding import ImageDecoder
from trl_tafs.training.experience import ScoredBatch
from trl_tafs.training.logs import Stopwatch
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.stopping import Stopped


@dataclass
class Scoring:
    """The scores of a batch on their way."""

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
class RolloutSampler:
    """Algorithm 1, lines 5 to 17, for the batches of one process."""

    config: TrainingOptions
    policy: Policy
    algorithm: Algorithm
    encode: PromptEncoder
    rewards: RewardSet
    keep_images: bool  # of the final step, for a hook
    stopwatch: Stopwatch
    keep: frozenset[str] = frozenset()  # of each rollout, besides what the objective needs: names of `rollout.KEPT`
    stop: Callable[[], bool] = lambda: False  # whether this process was told to stop: asked before each batch

    def __post_init__(self) -> None:
        asked, safe = self.config.async_reward_computation, not self.policy.devices.shared
        self.threaded = self.rewards.run_in_threads and safe if asked is None else asked  # or between the rollouts
        self.decoder = ImageDecoder.of(self.config, self.policy, len(self.algorithm.scored_steps_at(0)))

    def roll_out(
        self, prompts: PromptBatch, epoch: int, on_scored: Callable[[Tensor], None] | None = None
    ) -> ScoredBatch:
        """Sample one batch of trajectories; `on_scored` is given each scored step's latents on the way.

        Raises:
            NonFiniteError: a velocity is NaN or infinite.
        """
        levels, shape = self.algorithm.levels, self.algorithm.latent_shape
        needs, frequency = type(self.algorithm.objective).rollout_needs(self.config), self.config.sample_grid_freq
        needs = needs | self.keep | ({LAST} if self.config.matches_final_state else set())
        noise = SampleNoise(self.config.seed, epoch, tuple(prompts.sample_ids.tolist()), levels.device)
        groups = SampleNoise(self.config.seed, epoch, tuple(prompts.group_ids.tolist()), levels.device)
        initial = groups("shared", 0, shape) if self.config.share_initial_noise else noise("initial", 0, shape)
        velocity = DenoiserWatch(self.policy.pipeline, self.policy.velocity)
        with casting_once(levels.device):
            trajectories = rollout(
                velocity,
                self.algorithm.kernel_at(epoch),
                self.encode(prompts.prompts),
                levels,
                initial,
                noise,
                storage_dtype=self.policy.storage_dtype,
                reduction=self.config.log_prob_reduction,
                scored_steps=self.algorithm.scored_steps_at(epoch),
                on_scored=on_scored,
                keep=needs | {"clean"} if frequency and epoch % frequency == 0 else needs,
            )
        velocity.check()
        if "clean" not in needs:  # a grid shows it, and no update reads it
            trajectories = dataclasses.replace(trajectories, clean=trajectories.clean.cpu())
        return ScoredBatch(prompts, trajectories)

    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W) on the CPU."""
        return self.decoder(latents, tiny)

    def score(
        self,
        prompts: PromptBatch,
        latents: Tensor,
        scoring: Scoring,
        executor: ThreadPoolExecutor | None = None,
        last: bool = True,
    ) -> None:
        """Decode clean latents (B, K, *) of one step, the `last` or not; a future of their `Scores` is added.

        Raises:
            NonFiniteError: an image is; no reward sees it.
        """
        kinds = latents.shape[1]
        tiny = self.decoder.is_tiny(last)
        with self.stopwatch("decode"):
            images = self.decode(latents.flatten(0, 1), tiny)
            check_images(self.policy.pipeline, images, latents)
        if self.keep_images:
            scoring.images = None if tiny else images[::kinds].clone()
        texts = [prompt for prompt in prompts.prompts for _ in range(kinds)]
        metadata = [entry for entry in prompts.metadata for _ in range(kinds)]
        if tiny:
            self.decoder.compare(self.rewards, latents.flatten(0, 1), images, texts, metadata)
        if executor is not None:
            scoring.futures.append(executor.submit(self.rewards, images, texts, metadata))
            return
        with self.stopwatch("reward"):
            scoring.futures.append(answered(lambda: self.rewards(images, texts, metadata)))

    def sample(
        self,
        batches: Sequence[PromptBatch],
        epoch: int,
        kept: Sequence[dict[str, Any]] = (),
        progress: Callable[[str], None] = lambda stage: None,
    ) -> tuple[list[ScoredBatch], BaseException | None]:
        """Sample and score these batches.

        Args:
            batches: what to draw.
            epoch: the key of their noise.
            kept: payloads of an earlier try at this epoch, used instead of sampling and scoring again.
            progress: told "rollout" or "reward" after each batch.

        Returns:
            The scored batches, and the first fault, an error of a reward, a `NonFiniteError` or `Stopped`: what came
            before it is among the batches.
        """
        done: list[ScoredBatch] = []
        waiting: list[tuple[ScoredBatch, Scoring]] = []
        fault: BaseException | None = None

        def take_finished_scores() -> None:
            """Attach the scores of the batches that have them, in order; their scored latents are free then."""
            nonlocal fault
            while waiting and waiting[0][1].done:
                batch, scoring = waiting.pop(0)
                fault = fault or scoring.fault
                if scoring.futures and scoring.fault is None:
                    attach(batch, [future.result() for future in scoring.futures])
                progress("reward")

        devices = self.policy.devices
        with ThreadPoolExecutor(self.config.max_workers) if self.threaded else nullcontext() as executor:
            sampled = self._sampled_batches(batches, epoch, kept, progress, executor)
            try:
                # Where models share the device, all is drawn before anything is scored: one exchange an epoch.
                sampled = iter(list(sampled)) if devices.shared else sampled
                with devices.decoding() if devices.shared else nullcontext():
                    for batch, scoring in sampled:
                        done.append(batch)
                        self._score_steps(batch, scoring, executor)
                        waiting.append((batch, scoring))
                        take_finished_scores()
                        if self._agreed(fault is not None or scoring.fault is not None or self.stop()):
                            break
                for batch, scoring in sampled if devices.shared else ():  # drawn before the fault
                    done.append(batch)
                    waiting.append((batch, scoring))
            except NonFiniteError as error:  # handed on: the other processes wait for this one's rewards
                fault = error
                self._agreed(True)
            with self.stopwatch("reward"):  # what sampling didn't hide
                wait([future for _, scoring in waiting for future in scoring.futures])
        take_finished_scores()
        if fault is None and len([batch for batch in done if batch.scores is not None]) < len(batches):
            fault = Stopped()
        return done, fault

    def _sampled_batches(
        self,
        batches: Sequence[PromptBatch],
        epoch: int,
        kept: Sequence[dict[str, Any]],
        progress: Callable[[str], None],
        executor: ThreadPoolExecutor | None,
    ) -> Iterator[tuple[ScoredBatch, Scoring]]:
        """Yield the batches one after the other: restored where they were kept, or sampled.

        With an executor a step's images are scored while the next step is sampled, and their futures are here; without
        one they are scored later: the same calls with the same images, so that the rewards are the same.
        """
        for i, prompts in enumerate(batches):
            scoring = Scoring()
            if i < len(kept):
                batch = restored(prompts, kept[i], self.algorithm.levels.device)
            else:
                if self._agreed(self.stop()):
                    return
                with self.stopwatch("rollout"):
                    batch = self.roll_out(prompts, epoch, self._scorer(prompts, scoring, executor, epoch))
            progress("rollout")
            yield batch, scoring

    def _agreed(self, flag: bool) -> bool:
        """Whether a flag is up: here or, where all processes draw together, on any; asked before and after a batch."""
        return any_process(self.policy.accelerator, flag) if is_sharded(self.policy.accelerator) else flag

    def _scorer(
        self, prompts: PromptBatch, scoring: Scoring, executor: ThreadPoolExecutor | None, epoch: int
    ) -> Callable[[Tensor], None] | None:
        """Return what `rollout` hands a step's clean latents to.

        Where all processes draw together, none may find a fault in the middle of a rollout: then all is scored later.
        """
        if executor is None or is_sharded(self.policy.accelerator):
            return None
        scored = self.algorithm.scored_steps_at(epoch)
        return lambda latents: self.score(prompts, latents, scoring, executor, len(scoring.futures) == len(scored) - 1)

    def _score_steps(self, batch: ScoredBatch, scoring: Scoring, executor: ThreadPoolExecutor | None) -> None:
        """Have each scored step scored, where that hasn't begun and scores aren't there; and the hook's images."""
        if batch.scores is None and not scoring.futures:
            steps = batch.rollout.scored.unbind(1)
            for k, latents in enumerate(steps):
                self.score(batch.prompts, latents, scoring, executor, k == len(steps) - 1)
                if executor is None and scoring.fault is not None:
                    break
        if self.keep_images:
            batch.images = scoring.images if shows_result(batch, scoring, self.policy.storage_dtype) else None
        if self.keep_images and batch.images is None:
            with self.stopwatch("decode"):
                batch.images = self.decode(batch.rollout.final)


def answered(call: Callable[[], Scores]) -> Future:
    """Call here and now; the future of what it gives, or of its error, as an executor hands it on."""
    future: Future = Future()
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
    return future


def restored(prompts: PromptBatch, payload: dict[str, Any], device: torch.device) -> ScoredBatch:
    """Return a batch that an earlier try kept."""
    fields = {name: value.to(device) for name, value in payload["rollout"].items()}
    return ScoredBatch(prompts, Rollout(**fields), scores=payload["scores"], metadata={})


def shows_result(batch: ScoredBatch, scoring: Scoring, storage: torch.dtype) -> bool:
    """Whether the last image that was scored is what the sampler returned, up to the storage dtype's rounding."""
    if len(scoring.futures) != batch.rollout.scored.shape[1] or not len(batch.rollout.scored):
        return False
    return torch.equal(batch.rollout.scored[:, -1, 0].to(storage), batch.rollout.final.to(storage))


def attach(batch: ScoredBatch, scores: Sequence[Scores]) -> None:
    """Give a batch its scores, one `Scores` a scored step, and free the latents that were scored."""
    size, _, kinds = batch.rollout.scored.shape[:3]
    batch.scores = torch.stack([step.values.reshape(size, kinds, -1) for step in scores], dim=1)
    batch.metadata = scores[-1].metadata  # of the images that the sampler returned
    # no longer needed; an empty view would keep all of them
    batch.rollout = dataclasses.replace(batch.rollout, scored=batch.rollout.scored[:0].clone())
