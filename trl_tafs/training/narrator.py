"""What a run says from its opening line to its closing ones."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trl_tafs.output.speech import say, warn
from trl_tafs.processes import progress_bar
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.progress import Progress
from trl_tafs.training.symptoms import Symptoms

SHOWN = 4  # held-out metrics in a line


@dataclass
class Narrator:
    """Speaks for the main process of a run: the opening, the epochs' bar, evaluations, what looks wrong, the closing.

    Args:
        base: what the base model was loaded from, for commands; "" if that isn't known.
        held_out: names of the held-out metrics.
        latest: the last values that were logged, by name.
    """

    config: TrainingOptions
    accelerator: Accelerator
    plan: EpochPlan
    progress: Progress
    base: str
    held_out: tuple[str, ...]
    latest: Mapping[str, Any]
    symptoms: Symptoms = field(default_factory=Symptoms)
    began: float = 0.0

    def __post_init__(self) -> None:
        chosen, sign = self.config.metric_for_best_model, 1 if self.config.greater_is_better else -1
        names = (chosen,) if chosen else self.held_out
        self.symptoms.drawn = f"{'annealed' if self.config.anneals else 'ode'}_{self.config.sample_num_steps}"
        self.symptoms.direction = dict.fromkeys(names, sign if chosen else 1)

    @property
    def metric(self) -> str | None:
        """The held-out metric of the bar: the one that decides, or the first."""
        return self.config.metric_for_best_model or next(iter(self.held_out), None)

    def opening(self, first: int, last: int) -> None:
        """Say how much will be drawn and updated, and what is written where."""
        self.began = time.monotonic()
        self._say(self.arithmetic(max(0, last - first)))
        config, folder = self.config, Path(self.config.project_dir)
        written = ["metrics.jsonl"]
        written += [f"pictures/ every {config.picture_freq} epochs"] if config.picture_freq else []
        written += [f"samples/ every {config.sample_grid_freq}"] if config.sample_grid_freq else []
        often = {0: "at the end", None: "as often as they cost 5 percent of the time"}
        written.append(f"checkpoints/ {often.get(config.save_freq, f'every {config.save_freq} epochs')}")
        written += ["best/"] if config.metric_for_best_model else []
        written += ["at the end report.html and adapter/"]
        tracker = f"; {config.log_with}, too, has the numbers" if config.log_with else ""
        self._say(f"writes to {folder}: {', '.join(written)}{tracker}")

    def arithmetic(self, epochs: int) -> str:
        """Return a run's arithmetic: "20 epochs x 6 groups x 32 images x 4 steps = 3,840 images ..., 20 updates"."""
        plan, config = self.plan, self.config
        size = f"{plan.group_size} images"
        if plan.least_images != plan.most_images:
            size = f"{plan.least_images} to {plan.most_images} images, {plan.group_size} on the average"
        images = epochs * plan.total_images
        updates = epochs * plan.updates_per_inner_epoch * config.train_num_inner_epochs
        spread = f", on {plan.world_size} processes" if plan.world_size > 1 else ""
        return (
            f"{_count(epochs, 'epoch')} x {_count(plan.num_groups, 'group')} x {size} x {config.sample_num_steps} steps"
            f" = {images:,} images in {images * config.sample_num_steps:,} steps, {_count(updates, 'update')}{spread}"
        )

    def epochs(self, remaining: Iterable[int]) -> Iterator[int]:
        """Yield the epochs under a bar with reward, held-out metric and KL."""
        bar = progress_bar(self.accelerator, self.config.disable_tqdm, remaining, desc="epochs")
        try:
            for epoch in bar:
                yield epoch
                self._epoch_done(epoch, bar)
        finally:  # the run may stop early, and says so below the bar
            bar.close()

    def _epoch_done(self, epoch: int, bar: Any) -> None:
        held_out = self.progress.evaluations[-1].get(self.metric or "") if self.progress.evaluations else None
        shown = {"reward": self.latest.get("reward"), "held-out": held_out, "kl": self.latest.get("kl")}
        bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items() if value is not None})
        if self.accelerator.is_main_process:
            for said in self.symptoms.epoch(self.progress.reward_curve, self.latest.get("kl")):
                warn(f"epoch {epoch}: {said}")

    def evaluated(self, epoch: int, seconds: float) -> None:
        """Say what the last evaluation found, beside what the first one did, and what looks wrong in it."""
        rows = self.progress.evaluations
        names = sorted(self.held_out, key=lambda name: name != self.metric)[:SHOWN]
        told = [f"{name.removeprefix('eval/')} {_change(rows[0], rows[-1], name)}" for name in names]
        more = f", and {len(self.held_out) - SHOWN} more" if len(self.held_out) > SHOWN else ""
        when = "before training" if epoch == 0 else f"after epoch {epoch}"
        best = ", the best so far" if epoch and self.progress.evaluations_without_gain == 0 and self._decides() else ""
        self._say(f"held out, {when}: {', '.join(told)}{more}{best} ({seconds:.3g} s)")
        if self.accelerator.is_main_process:
            for said in self.symptoms.evaluation(rows, [reward for _, reward in self.progress.reward_curve]):
                warn(f"{when}: {said}")

    def closing(self, adapter: Path, repository: str, report: Path | None, prompts: Sequence[str]) -> None:
        """Say what came of it, where it is, and which commands go on from there."""
        curve, rows = self.progress.reward_curve, self.progress.evaluations
        if curve:
            took = _duration(time.monotonic() - self.began)
            self._say(f"reward {curve[0][1]:.4g} in the first epoch, {curve[-1][1]:.4g} in the last ({took})")
        if rows and self.metric:
            self._say(f"held out, {self.metric.removeprefix('eval/')}: {_change(rows[0], rows[-1], self.metric)}")
        self._say(f"adapter: {adapter}" + (f"; report: {report}" if report else ""))
        for line in next_commands(self.base or "BASE", adapter, repository, str(prompts[0])[:80]):
            self._say(f"  {line}")

    def _decides(self) -> bool:
        return self.config.metric_for_best_model is not None

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            say(line)


def next_commands(base: str, adapter: Path, repository: str, prompt: str) -> list[str]:
    """Return the commands that draw with an adapter, compare it with its base and publish it."""
    words = [
        ["trl-tafs", "sample", str(adapter), "--pretrained_model", base, "--prompt", prompt],
        ["trl-tafs", "evaluate", "none", str(adapter), "--pretrained_model", base, "--prompts", "PROMPTS.txt"],
        ["trl-tafs", "push", str(adapter), repository],
    ]
    words[1] += ["--reward", "clip_score"]
    return [shlex.join(line) for line in words]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _change(first: Mapping[str, float], last: Mapping[str, float], name: str) -> str:
    before, after = first.get(name, float("nan")), last.get(name, float("nan"))
    return f"{after:.4g}" if first is last else f"{after:.4g} (first {before:.4g})"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} hours" if hours >= 2 else f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} s"
