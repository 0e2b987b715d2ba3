"""An evaluation's units: what is drawn, how, and the lines of scores that every process writes."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.statistics import THUMBNAIL


@dataclass(frozen=True)
class Sampling:
    """One way of drawing images."""

    sampler: str
    num_steps: int
    height: int
    width: int
    guidance_scale: float

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser an image: twice the steps with guidance."""
        return self.num_steps * (2 if self.guidance_scale > 1 else 1)

    @property
    def label(self) -> str:
        """As a folder is named."""
        guidance = f"_guidance{self.guidance_scale:g}" if self.guidance_scale > 1 else ""
        return f"{self.sampler}_{self.num_steps}_{self.height}x{self.width}{guidance}"


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

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def identity(self) -> dict[str, Any]:
        """What must be the same for an evaluation to be gone on with."""
        digest = hashlib.sha256(json.dumps(self.prompts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        settings = {"prompts": digest, "images_per_prompt": self.images_per_prompt, "seed": self.seed}
        return settings | {"rewards": list(self.rewards.names), "step_rewards": self.step_rewards}


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
