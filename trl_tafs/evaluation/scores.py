"""What is evaluated, and the lines of scores that every process writes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.evaluation.statistics import IMAGE_STATISTICS, THUMBNAIL, thumbnails
from trl_tafs.pipelines.pictures import Picture, prompt_key
from trl_tafs.rewards.scoring import RewardSet


@dataclass(frozen=True)
class Task:
    """The prompts, the rewards, and all else that decides an evaluation's numbers but the models."""

    prompts: tuple[tuple[str, dict[str, Any]], ...]
    images_per_prompt: int
    seed: int
    batch_size: int
    rewards: RewardSet
    step_rewards: bool  # score every step's clean estimate too
    keep_prompts: int  # the first so many prompts' first images are saved, for grids
    encoding: Mapping[str, Any] = field(default_factory=dict)  # arguments of `PromptEncoder`
    reward_options: Mapping[str, Any] = field(default_factory=dict)  # by reward, as far as they are known

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def identity(self) -> dict[str, Any]:
        """Return the settings that must match for an evaluation to be resumed."""
        prompts = [(prompt_key(prompt), metadata) for prompt, metadata in self.prompts]
        digest = hashlib.sha256(json.dumps(prompts, sort_keys=True, default=_told).encode()).hexdigest()[:16]
        settings = {"prompts": digest, "images_per_prompt": self.images_per_prompt, "seed": self.seed}
        settings |= {name: value for name, value in self.encoding.items() if name != "guidance_scale"}  # in each label
        settings |= {"rewards": list(self.rewards.names), "reward_options": self.reward_options}
        return settings | {"step_rewards": self.step_rewards}


def _told(value: Any) -> str:
    """What stands for a prompt's metadata that JSON doesn't know: a picture's content, else its text."""
    return Picture(value).digest if hasattr(value, "tobytes") and hasattr(value, "getexif") else str(value)


def score_lines(task: Task, sample_ids: Sequence[int], images: Tensor, values: Tensor) -> list[dict[str, Any]]:
    """Return a line of scores for each image.

    Args:
        task: what is evaluated.
        sample_ids: B numbers of images.
        images: (B, 3, H, W), the results.
        values: (B, N, R) rewards of each step's images, the result's last; N = 1 where steps aren't scored.
    """
    statistics = {name: measure(images) for name, measure in IMAGE_STATISTICS.items()}
    small, names = thumbnails(images), task.rewards.names
    lines = []
    for b, sample in enumerate(sample_ids):
        line: dict[str, Any] = {"sample": sample, "prompt": sample // task.images_per_prompt}
        line["rewards"] = dict(zip(names, _numbers(values[b, -1]), strict=True))
        line["statistics"] = {name: round(measured[b].item(), 6) for name, measured in statistics.items()}
        line["thumbnail"] = base64.b64encode(small[b].numpy().tobytes()).decode("ascii")
        if task.step_rewards:
            line["steps"] = {name: _numbers(values[b, :, r]) for r, name in enumerate(names)}
        lines.append(line)
    return lines


def _numbers(values: Tensor) -> list[float | None]:
    return [None if value != value else float(value) for value in values]


def read_scores(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of all processes, by sample number; a line torn by a kill is left out."""
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
    """Return a thumbnail of a line of scores, (3, 16, 16) uint8."""
    data = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return torch.from_numpy(data.reshape(3, THUMBNAIL, THUMBNAIL).copy())
