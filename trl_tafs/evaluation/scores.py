"""An evaluation's units: what is drawn, how, and the lines of scores that every process writes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.evaluation.statistics import THUMBNAIL
from trl_tafs.rewards.scoring import RewardSet


@dataclass(frozen=True)
class Sampling:
    """One way of drawing images."""

    sampler: str
    num_steps: int
    height: int
    width: int
    guidance_scale: float
    embedded_guidance_scale: float | None = None  # None: the family's default

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser an image: twice the steps with guidance."""
        return self.num_steps * (2 if self.guidance_scale > 1 else 1)

    @property
    def label(self) -> str:
        """As a folder is named."""
        guidance = f"_guidance{self.guidance_scale:g}" if self.guidance_scale > 1 else ""
        embedded = "" if self.embedded_guidance_scale is None else f"_embedded{self.embedded_guidance_scale:g}"
        return f"{self.sampler}_{self.num_steps}_{self.height}x{self.width}{guidance}{embedded}"


@dataclass(frozen=True)
class Task:
    """What is evaluated, as far as it decides the numbers."""

    prompts: tuple[tuple[str, dict[str, Any]], ...]
    images_per_prompt: int
    seed: int
    batch_size: int
    rewards: RewardSet
    step_rewards: bool  # score every step's clean estimate too
    keep_prompts: int  # the first so many prompts' first images are saved, for grids
    encoding: Mapping[str, Any] = field(default_factory=dict)  # how prompts are encoded: `PromptEncoder`'s arguments
    reward_options: Mapping[str, Any] = field(default_factory=dict)  # by the rewards' names, as far as they are known

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def identity(self) -> dict[str, Any]:
        """What must be the same for an evaluation to be gone on with."""
        digest = hashlib.sha256(json.dumps(self.prompts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        settings = {"prompts": digest, "images_per_prompt": self.images_per_prompt, "seed": self.seed}
        settings |= {name: value for name, value in self.encoding.items() if name != "guidance_scale"}  # a label's
        settings |= {"rewards": list(self.rewards.names), "reward_options": self.reward_options}
        return settings | {"step_rewards": self.step_rewards}


def read_scores(folder: Path) -> dict[int, dict[str, Any]]:
    """All lines that any process wrote, by sample number; a line torn by a kill is left out."""
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["sample"]] = row
    return rows


def read_thumbnail(text: str) -> Tensor:
    """(3, 16, 16) uint8."""
    data = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return torch.from_numpy(data.reshape(3, THUMBNAIL, THUMBNAIL).copy())


def describe(sampling: Sampling) -> dict[str, Any]:
    """A sampling's settings with its number of evaluations."""
    return asdict(sampling) | {"nfe": sampling.nfe}
