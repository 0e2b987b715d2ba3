"""What the doctor says: findings with their remedies, and the report that they stand in."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Any

WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and what to do about it."""

    severity: str  # "error": training can't work so; "warning": it works worse than it could
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


@dataclass(frozen=True)
class RewardFacts:
    """One reward on the images of the last scored step."""

    name: str
    mean: float
    least: float
    most: float
    group_std: float  # mean of the groups' deviations
    still_groups: float  # share of groups without variance
    no_score: float  # share of images without a score
    noise: float | None  # share of the variance within groups that is noise; None: there is none, or no score

    @property
    def constant(self) -> bool:
        """Whether no group varies."""
        return self.still_groups == 1.0

    def line(self) -> str:
        """Return the facts in words."""
        noise = "" if self.noise is None else f", {self.noise:.0%} of it noise"
        missing = f"; no score for {self.no_score:.0%} of the images" if self.no_score else ""
        return (
            f"{self.name}: mean {self.mean:.4g}, from {self.least:.4g} to {self.most:.4g}; deviation within groups "
            f"{self.group_std:.4g}{noise}; {self.still_groups:.0%} of the groups without variance{missing}"
        )


@dataclass(frozen=True)
class Drift:
    """How far the replay is from the rollout, before the policy has moved."""

    kind: str  # "ratio": max |r - 1|; "prediction": rms of the clean estimates' difference, relative to their own
    value: float
    clip_range: float | None  # of a ratio

    @property
    def share(self) -> float:
        """A ratio's share of the clip range; of predictions the value itself."""
        return self.value / self.clip_range if self.clip_range else self.value

    def line(self) -> str:
        """Return the drift in words."""
        if self.clip_range:
            return f"max |ratio - 1| is {self.value:.2g}, {self.share:.1%} of the clip range {self.clip_range:.3g}"
        return f"the replayed predictions differ from the rollout's by {self.value:.2g} of their size"


@dataclass(frozen=True)
class Gradients:
    """Which trained parameters a gradient reaches, by kind; counted over two updates, as lora_A has none before."""

    reached: dict[str, int]
    expected: dict[str, int]  # without those that can't have one
    missing: tuple[str, ...]  # names of those that should have one
    dead: int  # that can't have one in this family

    def line(self) -> str:
        """Return the counts in words."""
        parts = [f"{self.reached[kind]} of {count} {kind}" for kind, count in self.expected.items()]
        dead = f"; {self.dead} more can't have one in this model" if self.dead else ""
        return f"at {', '.join(parts)}{dead}"


@dataclass(frozen=True)
class Estimate:
    """Seconds of an epoch, by phase, and of the run, scaled from a small one."""

    phases: dict[str, float]  # seconds an epoch
    epochs: int  # that are left

    @property
    def epoch_seconds(self) -> float:
        """Of all phases."""
        return sum(self.phases.values())

    @property
    def hours(self) -> float:
        """Of all epochs that are left, without evaluations and checkpoints."""
        return self.epoch_seconds * self.epochs / 3600

    @classmethod
    def scaled(cls, seconds: dict[str, float], images: int, epoch_images: int, passes: int, epochs: int) -> Estimate:
        """Scale what `images` images took to an epoch of `epoch_images`, with `passes` updates of each."""
        factor = epoch_images / images
        phases = {name: value * factor * (passes if name == "update" else 1) for name, value in seconds.items()}
        return cls(phases, epochs)

    def line(self) -> str:
        """Return the times in words."""
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in self.phases.items())
        whole = f"{self.hours:.3g} hours" if self.hours >= 1 else f"{60 * self.hours:.3g} minutes"
        return f"{self.epoch_seconds:.3g} s an epoch ({parts}); {whole} for {self.epochs} epochs"


@dataclass(frozen=True)
class DoctorReport:
    """What one rollout and one update showed; what wasn't reached is None."""

    epoch: str  # the arithmetic of an epoch
    images: int  # that were drawn, of all processes
    groups: int
    findings: tuple[Finding, ...]
    finite: tuple[str, ...] = ()  # what was looked at, and is
    pixels: tuple[float, float] | None = None  # least and most, in [0, 1]
    rewards: tuple[RewardFacts, ...] = ()
    drift: Drift | None = None
    gradients: Gradients | None = None
    memory_gib: float | None = None  # the planned peak
    time: Estimate | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing stands in training's way; a warning doesn't."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> str:
        """Return all of it for a machine."""
        values: dict[str, Any] = dataclasses.asdict(self) | {"healthy": self.healthy}
        if self.time is not None:
            values["time"] |= {"epoch_seconds": self.time.epoch_seconds, "hours": self.time.hours}
        return json.dumps(values, indent=2)

    def __str__(self) -> str:
        lines = [("epoch", self.epoch), ("tried", f"{self.images} images of {self.groups} prompts")]
        lines.append(("finite", ", ".join(self.finite) or "nothing"))
        if self.pixels is not None:
            lines.append(("pictures", f"pixels from {self.pixels[0]:.2f} to {self.pixels[1]:.2f}"))
        lines += [("reward", reward.line()) for reward in self.rewards]
        named = {"on policy": self.drift, "gradients": self.gradients, "time": self.time}
        lines += [(name, part.line()) for name, part in named.items() if part is not None]
        if self.memory_gib is not None:
            lines.append(("memory", f"{self.memory_gib:.2f} GiB planned at the peak"))
        told = [_wrapped(f"{name:10} {text}", 11) for name, text in lines]
        for finding in self.findings:
            told.append(_wrapped(f"{finding.severity.upper():10} {finding.what}", 11))
            told.append(_wrapped(f"{'change':10} {finding.remedy}", 11))
        told.append("healthy: nothing stands in the way of training" if self.healthy else "not healthy")
        return "\n".join(told)


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
