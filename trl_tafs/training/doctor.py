"""`Doctor`: one rollout and one update of a run, without a trace, and a report on what they show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_tafs.method.types import RewardTable
from trl_tafs.processes import any_process, gather_rows, same_everywhere, share
from trl_tafs.prompts.source import expand_groups
from trl_tafs.training import checks
from trl_tafs.training.collector import Collector
from trl_tafs.training.experience import Draw, Experience
from trl_tafs.training.findings import DoctorReport, Drift, Estimate, Finding
from trl_tafs.training.logs import Stopwatch
from trl_tafs.training.memory import GIB
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.preflight import Preflight
from trl_tafs.training.progress import Progress
from trl_tafs.training.trace import leaving_no_trace
from trl_tafs.training.trial import TrialStep, prediction_distance, trained_names, trial_step
from trl_tafs.training.updater import Updater

PHASES = ("rollout", "decode", "reward", "update")
LEAST_IMAGES = 4  # two groups of two


@dataclass
class Doctor:
    """Tries a run's own stages on a batch or two: `trainer.doctor()`, `trl-tafs doctor`.

    All processes take part. Weights, optimizer, averages, statistics and the global generators are put back; nothing
    is written but prompts into the cache of prompts. A prompt function or reward with a state of its own is called.
    """

    preflight: Preflight
    collector: Collector
    updater: Updater
    progress: Progress

    def __call__(self) -> DoctorReport:
        """Return what one rollout and one update of the next epoch show."""
        policy, algorithm = self.updater.policy, self.collector.sampler.algorithm
        visit = Visit(self.preflight, self.collector, self.updater, self.progress.epoch)
        with leaving_no_trace(policy, policy.states() | algorithm.states()):
            visit.run()
        found = visit.shared_findings()
        config, plan, report = self.updater.config, self.updater.plan, visit.report
        if "time/update" in visit.seconds:
            seconds = {name: visit.seconds.get(f"time/{name}", 0.0) for name in PHASES}
            left, passes = max(config.num_epochs - self.progress.epoch, 0), config.train_num_inner_epochs
            report["time"] = Estimate.scaled(seconds, visit.plan.local_images, plan.local_images, passes, left)
        return DoctorReport(
            epoch=plan.line(config.train_num_inner_epochs),
            images=visit.plan.total_images,
            groups=visit.plan.num_groups,
            findings=(*checks.plan_findings(plan), *found),
            finite=tuple(visit.finite),
            **report,
        )


def small_plan(updater: Updater) -> EpochPlan:
    """Return the plan of an epoch of a few images in one update: whole sample batches, enough for a minibatch."""
    config, plan = updater.config, updater.plan
    batch = config.sample_batch_size
    images = min(-(-max(LEAST_IMAGES, config.train_batch_size) // batch) * batch, plan.local_images)
    groups = min(2, plan.num_groups, images * plan.world_size // 2)
    return dataclasses.replace(
        plan,
        local_images=images,
        group_size=images * plan.world_size // groups,
        num_groups=groups,
        images_per_update=images,
        micro_batches_per_update=-(-images * config.num_replayed_rows // config.train_batch_size),
    )


@dataclass
class Visit:
    """One examination: its stages in order, and what they found so far."""

    preflight: Preflight
    collector: Collector
    updater: Updater
    epoch: int
    findings: list[Finding] = field(default_factory=list)  # of this process
    finite: list[str] = field(default_factory=list)  # what was looked at, and is
    report: dict[str, Any] = field(default_factory=dict)  # fields of `DoctorReport`
    seconds: dict[str, float] = field(default_factory=dict)  # `time/<phase>`

    def __post_init__(self) -> None:
        self.config, self.policy = self.updater.config, self.updater.policy
        self.accelerator, self.plan = self.policy.accelerator, small_plan(self.updater)
        self.algorithm, self.rewards = self.collector.sampler.algorithm, self.collector.sampler.rewards
        self.dtype = self.policy.pipeline.model_dtype

    def run(self) -> None:
        """Go through the stages until one finds that the next makes no sense."""
        stages = {
            "prompts": self._choose_prompts,
            "first two images": self._look_at_two,
            "rollout": self._sample,
            "rewards": self._judge,
            "update": self._update,
        }
        for stage, work in stages.items():
            failed = False
            try:
                work()
            except Exception as error:  # of the user's rewards, the device, a check: what would end training
                if stage == "update" and self.accelerator.num_processes > 1:
                    raise  # the other processes wait for this one's gradients
                self.findings.append(checks.error_finding(error, stage))
                failed = True
            # rewards that teach nothing leave the update to be looked at
            failed = failed or (stage != "rewards" and any(found.severity == "error" for found in self.findings))
            if any_process(self.accelerator, failed):
                return

    def shared_findings(self) -> list[Finding]:
        """Return the findings of all processes, each once."""
        if self.accelerator.num_processes == 1:
            return list(dict.fromkeys(self.findings))
        from accelerate.utils import gather_object

        return list(dict.fromkeys(gather_object(self.findings)))

    def _choose_prompts(self) -> None:
        """Choose the images of all processes, in groups of one size up to the last."""
        found = self.preflight.prompts.groups(self.epoch, self.plan.num_groups)
        groups = same_everywhere(self.accelerator, found)
        size, last = self.plan.group_size, len(groups) - 1
        self.prompts = expand_groups(groups, [size] * last + [self.plan.total_images - size * last])

    def _look_at_two(self) -> None:
        """Draw and score two images first, which is cheap, loads what is loaded late, and warms up what is timed."""
        prompt, metadata = self.prompts.prompts[0], self.prompts.metadata[0]
        plan = self.preflight.logs.memory_plan
        self.preflight.encode([prompt])
        self.report["memory_gib"] = None if plan is None else plan.peak() / GIB
        self.finite.append("prompts")
        self.preflight.look(prompt, metadata, self.epoch)

    def _sample(self) -> None:
        """Draw this process's images as an epoch does, and score them; what isn't finite raises."""
        watch = Stopwatch()
        sampler = dataclasses.replace(
            self.collector.sampler, stopwatch=watch, keep_images=False, keep=frozenset({"states", "clean"})
        )
        with self.policy.sampling():
            self.batches, fault = sampler.sample(self.collector.local_batches(self.prompts), self.epoch)
        self.seconds = watch.pop()
        if fault is not None:
            raise fault
        images = torch.cat([sampler.decode(batch.rollout.final) for batch in self.batches])
        self.finite += ("velocities", "pictures")
        self.findings += checks.picture_findings(images, self.policy.pipeline.vae.dtype)
        self.pixels = torch.stack([images.min(), images.max()])
        mine = self.prompts[share(self.accelerator, len(self.prompts))]
        self.twice = [self.rewards(images, mine.prompts, mine.metadata).values for _ in range(2)]

    def _judge(self) -> None:
        """Look at the pictures and rewards of all processes."""
        pixels = gather_rows(self.accelerator, self.pixels[None])
        self.report["pixels"] = pixels[:, 0].min().item(), pixels[:, 1].max().item()
        values = gather_rows(self.accelerator, torch.cat([batch.scores for batch in self.batches]))
        self.table = RewardTable(values, self.rewards.names, self.rewards.weights)
        first, second = (gather_rows(self.accelerator, scores) for scores in self.twice)
        ids = self.prompts.group_ids
        facts = checks.reward_facts(self.table, ids, checks.noise_shares(first, second, ids))
        self.report["rewards"] = facts
        self.findings += checks.reward_findings(facts, self.rewards.weights)
        self.finite.append("rewards")  # an infinite one has been refused

    def _update(self) -> None:
        """Take two optimizer steps on the images, as lora_A has no gradient before the first one."""
        place, rate = share(self.accelerator, len(self.prompts)), self.config.train_learning_rate
        draw = Draw(self.prompts, self.batches, self.table, torch.arange(place.start, place.stop))
        advantages = self.algorithm.credit(self.table, self.prompts, self.epoch).advantages
        if not advantages.any():  # that the rewards teach nothing was said; gradients are looked at all the same
            advantages = torch.ones_like(advantages)
            advantages[1::2] = -1.0
        for group in self.policy.optimizer.param_groups:
            group["lr"] = rate  # the warm-up's begins at 0
        if not self.updater.objective.from_actions:
            size = self.config.train_batch_size
            distance = prediction_distance(self.policy, self.updater.encode, self.batches, size)
            self._see_drift(Drift("prediction", distance, None))
        updater = dataclasses.replace(self.updater, plan=self.plan)
        names, peaks = trained_names(self.policy), []
        for moved in (False, True):
            step = trial_step(updater, Experience.of([draw]), advantages, self.epoch)
            peaks.append(step.peaks)
            if not moved and step.ratio is not None and self._samples_itself:
                self._see_drift(Drift("ratio", step.ratio, self.algorithm.clip_range))
            if not self._finite_after(step, names, moved):
                return
        self.seconds["time/update"] = step.seconds
        reached = dict(zip(names, torch.maximum(*peaks).tolist(), strict=True))
        self.report["gradients"] = checks.gradient_facts(reached, self.policy.pipeline.dead_lora_modules)
        frozen = [name for name, p in zip(names, self.policy.parameters, strict=True) if not p.requires_grad]
        full = self.config.full_finetuning
        self.findings += checks.gradient_findings(self.report["gradients"], frozen, full)

    @property
    def _samples_itself(self) -> bool:
        """Whether the policy that is updated drew the rollouts, and not an older one."""
        return self.policy.old is None or self.policy.old.epochs == 0

    def _finite_after(self, step: TrialStep, names: Sequence[str], moved: bool) -> bool:
        """Check a step's gradients and the weights after it; `moved`: they had moved before."""
        rate = self.config.train_learning_rate
        gradients = [name for name, peak in zip(names, step.peaks.tolist(), strict=True) if not math.isfinite(peak)]
        weights = [name for name, p in zip(names, self.policy.parameters, strict=True) if not p.isfinite().all()]
        found = checks.overflow_findings(gradients, "gradients", moved, rate, self.dtype)
        found += checks.overflow_findings(weights, "trained weights", True, rate, self.dtype)
        self.findings += found
        self.finite += () if found or not moved else ("gradients", "weights after an update")
        return not found

    def _see_drift(self, drift: Drift) -> None:
        self.report["drift"] = drift
        sizes = self.config.sample_batch_size, self.config.train_batch_size
        self.findings += checks.drift_findings(drift, self.dtype, sizes)
