"""What an epoch logs: rewards, updates, seconds by phase; averages that stay on their device until then."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_tafs.algorithm import Algorithm
from trl_tafs.method.advantages import AdvantageTable, group_mean_std
from trl_tafs.method.types import RewardTable
from trl_tafs.output.speech import warn
from trl_tafs.policy.policy import Policy
from trl_tafs.training.experience import Experience
from trl_tafs.training.memory import GIB, MemoryPlan
from trl_tafs.training.progress import Progress

CLIPPED_WARNING = 0.3
BACKWARD = 2  # evaluations that a backward pass costs
PHASES = ("rollout", "decode", "reward", "update")  # of an epoch, by the stopwatch


def warn_main(accelerator: Accelerator, message: str) -> None:
    """Warn once for all processes."""
    if accelerator.is_main_process:
        warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Work:
    """Evaluations of the denoiser in an epoch, on this process."""

    sampled: int  # in the rollout; 0 where an earlier process had done it
    updated: int  # in the update
    backward: int  # rows of the update that a gradient goes back through


class Meter:
    """Counts an epoch's evaluations of the denoiser on this process.

    Args:
        policy: which counts all of them.
        backward: rows of an update that a gradient goes back through.
    """

    def __init__(self, policy: Policy, backward: int) -> None:
        self.policy, self.backward = policy, backward
        self.begin()

    def begin(self) -> None:
        """Mark where the rollout begins."""
        self._first = self._then = self.policy.evaluations

    def sampled(self) -> None:
        """Mark where the rollout ends."""
        self._then = self.policy.evaluations

    def work(self) -> Work:
        """Return what was done since the rollout began."""
        return Work(self._then - self._first, self.policy.evaluations - self._then, self.backward)


class MeanMetrics:
    """Sums metric dicts on their device; `pop` gives their means and starts anew. No host copy before that.

    What is set in `last` is given as it is.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one dict of scalars, () each."""
        for name, value in metrics.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value.detach().clone()
        self.count += 1

    def mean(self, name: str) -> float:
        """Return the mean of one metric so far, by a host copy; NaN if there is none."""
        return self.totals[name].item() / self.count if name in self.totals else float("nan")

    def pop(self) -> dict[str, Tensor]:
        """Return the means since the last `pop`."""
        means = {name: total / max(self.count, 1) for name, total in self.totals.items()} | self.last
        self.totals, self.last, self.count = {}, {}, 0
        return means


class Stopwatch:
    """Seconds spent in named stretches; a stretch within another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of stretches within the present one

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stretch; `with stopwatch("rollout"):`."""
        outer, self._inner, start = self._inner, 0.0, time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner
            self._inner = outer + elapsed

    def pop(self) -> dict[str, float]:
        """`time/<name>` of each stretch since the last `pop`."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}


class EpochLog:
    """Log lines of each epoch, to all trackers.

    Args:
        accelerator: whose trackers are written.
        algorithm: of the run, whose actions are logged, and the sizes of whose groups where they vary.
        progress: of the run.
        memory_plan: to log beside what is measured.
    """

    def __init__(
        self, accelerator: Accelerator, algorithm: Algorithm, progress: Progress, memory_plan: MemoryPlan | None = None
    ) -> None:
        self.accelerator, self.progress, self.memory_plan = accelerator, progress, memory_plan
        self.clip, self.varying_groups = algorithm.ratio_limit, algorithm.prompt_tracker is not None
        self.actions = slice(0, algorithm.kernel.num_actions)
        self.latest: dict[str, Any] = {}  # the last value of each name
        self._pace = math.inf  # seconds of an evaluation of the denoiser in the fastest rollout so far
        self._warned = False

    def _log(self, values: dict[str, Any], global_step: int) -> None:
        self.latest |= values
        self.accelerator.log(values, step=global_step)

    def _warn(self, line: str) -> None:
        if self.accelerator.is_main_process:
            warn(line)

    def experience(
        self, experience: Experience, credit: AdvantageTable, scored_steps: range, epoch: int, global_step: int
    ) -> float:
        """Log an epoch's rewards, steps named as in the paper, from 1; return the mean reward of the final images."""
        values = reward_values(experience.rewards, credit, scored_steps, self.actions)
        if experience.prompts.group_ids.unique().numel() == len(experience.prompts):  # DDPO's groups of one
            del values["reward/group_std"], values["frac_reward_zero_std"]
        values["frac_zero_advantage"] = (credit.advantages == 0).float().mean().item()
        self._warn_idle(experience, credit, epoch)
        self._log({"epoch": epoch} | values, global_step)
        if self.varying_groups:
            groups = group_values(experience.prompts.group_ids, credit.group_std[:, -1, 0])
            self._log(groups | {"epoch": epoch}, global_step)
        return values["reward"]

    def _warn_idle(self, experience: Experience, credit: AdvantageTable, epoch: int) -> None:
        """Warn of an epoch without any advantage: of the first in a row, the second, the fourth, the eighth, ..."""
        idle = not credit.advantages.any()
        self.progress.idle_epochs = count = self.progress.idle_epochs + 1 if idle else 0
        if not idle or count & (count - 1):
            return
        constant = ", ".join(constant_rewards(experience.rewards, experience.prompts.group_ids))
        cause = f"{constant} gave" if constant else "the weighted sum of the rewards is"
        self._warn(
            f"epoch {epoch}: no image has an advantage, so nothing is learned from it ({count} such in a row): {cause} "
            "the same for all images of each prompt. Use a reward that tells images of one prompt apart, prompts that "
            "are neither too easy nor too hard, or a larger num_generations. No optimizer step is taken, but for the "
            "pull to the base that beta above 0 is, and for distribution matching",
        )

    def update(self, values: dict[str, Tensor], inner_epoch: int, rate: float, epoch: int, global_step: int) -> None:
        """Log one optimizer step: its metrics, reduced over processes at once."""
        names = sorted(values)
        reduced = self.accelerator.reduce(torch.stack([values[name].float() for name in names]), reduction="mean")
        line: dict[str, Any] = dict(zip(names, reduced.tolist(), strict=True))
        line |= {"epoch": epoch, "inner_epoch": inner_epoch, "learning_rate": rate}
        self._log(line, global_step)
        if line.get("clipfrac", 0.0) > CLIPPED_WARNING and not self._warned:
            self._warned = True
            self._warn(
                f"epoch {epoch}: {line['clipfrac']:.0%} of the ratios are clipped at {self.clip}, "
                "which throttles training; raise it, or lower train_learning_rate or the number of updates an "
                "epoch",
            )

    def timing(self, stopwatch: Stopwatch, images: int, work: Work, epoch: int, global_step: int) -> None:
        """Log what an epoch cost: seconds by phase, images a second, evaluations; on a GPU its peak memory so far.

        Args:
            stopwatch: of its phases.
            images: of all processes.
            work: what this one did in them.
            epoch: which.
            global_step: optimizer steps so far.
        """
        values = stopwatch.pop() | {"epoch": epoch}
        seconds = sum(values.get(f"time/{name}", 0.0) for name in PHASES)
        values["images_per_second"] = images / seconds
        evaluations = work.sampled + work.updated
        values["evaluations_per_image"] = evaluations * self.accelerator.num_processes / images
        if work.sampled:
            self._pace = min(self._pace, values.get("time/rollout", math.inf) / work.sampled)
            asked = (evaluations + BACKWARD * work.backward) * self._pace
            values["time/floor"] = asked + values.get("time/decode", 0.0) + values.get("time/reward", 0.0)
        if self.memory_plan is not None and torch.cuda.is_available():
            measured = torch.cuda.max_memory_allocated(self.accelerator.device)
            values |= {"memory/peak_gib": measured / GIB, "memory/planned_gib": self.memory_plan.peak() / GIB}
        self._log(values, global_step)


def reward_values(
    rewards: RewardTable, credit: AdvantageTable, scored_steps: range, actions: slice
) -> dict[str, float]:
    """Return the log's values of an epoch's rewards: means and deviations, by step and by reward."""
    final = credit.combined[:, -1, actions]
    scored = final[~final.isnan()]
    mean, std = scored.mean().item(), scored.std(unbiased=False).item()
    values = {"reward": mean, "reward_mean": mean, "reward_std": std}
    for q, n in enumerate(scored_steps):
        values[f"reward/step_{n + 1}"] = credit.combined[:, q, actions].nanmean().item()
    values["reward/group_std"] = credit.group_std[:, -1, actions].mean().item()
    values["frac_reward_zero_std"] = (credit.group_std[..., actions] == 0).float().mean().item()
    values["frac_no_verdict"] = credit.combined.isnan().float().mean().item()
    for r, name in enumerate(rewards.names):
        column = rewards.values[:, -1, actions, r]
        column = column[~column.isnan()]
        if column.numel():
            values[f"rewards/{name}/mean"] = column.mean().item()
            values[f"rewards/{name}/std"] = column.std(unbiased=False).item()
    return values


def constant_rewards(rewards: RewardTable, group_ids: Tensor) -> list[str]:
    """Return the names of the rewards that tell no two images of a group apart; of all, where a group is one image."""
    alone = group_ids.unique().numel() == len(group_ids)
    groups = torch.zeros_like(group_ids) if alone else group_ids
    columns = zip(rewards.names, rewards.values.unbind(-1), strict=True)
    return [name for name, column in columns if not group_mean_std(column, groups)[1].any()]


def group_values(group_ids: Tensor, group_std: Tensor) -> dict[str, float]:
    """Return how an epoch's images were shared: sizes, and the correlation of a prompt's size with its deviation.

    Args:
        group_ids: (B,) int64.
        group_std: (B,) the deviation of each image's group.
    """
    sizes = torch.bincount(group_ids)
    deviations = group_std.new_zeros(len(sizes)).index_copy(0, group_ids, group_std)
    values = {"groups/size_min": sizes.min().item(), "groups/size_max": sizes.max().item()}
    if len(sizes) > 1 and sizes.float().std() > 0 and deviations.std() > 0:
        values["groups/size_std_correlation"] = torch.corrcoef(torch.stack([sizes.to(deviations), deviations]))[
            0, 1
        ].item()
    return values
