"""What one epoch gathers: prompts and rewards of all processes, rollouts of this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.method.types import PromptBatch, RewardTable, Rollout


@dataclass
class ScoredBatch:
    """One sampled batch: its prompts, its rollout, and its rewards once they are there."""

    prompts: PromptBatch
    rollout: Rollout
    images: Tensor | None = None  # (B, 3, H, W) on the CPU, what the sampler returned, where a hook wants it
    scores: Tensor | None = None  # (B, Q, K, R)
    metadata: Any = None  # what the rewards returned beside their values

    def payload(self) -> dict[str, Any]:
        """Return tensors and plain values, for a file."""
        fields = {f.name: getattr(self.rollout, f.name).cpu() for f in dataclasses.fields(self.rollout)}
        return {"rollout": fields, "scores": self.scores}


@dataclass
class Draw:
    """What is drawn together: all of an epoch's images, or the first or second share of streaming groups."""

    prompts: PromptBatch  # of all processes
    batches: list[ScoredBatch]  # of this process
    rewards: RewardTable  # of all processes, (B, Q, K, R)
    local_images: Tensor  # (b,) int64, the places of this process's images among the B


@dataclass(frozen=True)
class Experience:
    """An epoch's images: B of all processes, b of this one."""

    prompts: PromptBatch  # B
    batches: list[ScoredBatch]  # this process's, b images in all
    rewards: RewardTable  # (B, Q, K, R)
    local_images: Tensor  # (b,) int64, the places of this process's images among the B

    def local(self, values: Tensor) -> Tensor:
        """Return this process's share (b, ...) of what belongs to all images (B, ...), in the order of `batches`."""
        return values[self.local_images]

    @classmethod
    def of(cls, draws: Sequence[Draw]) -> Experience:
        """Join an epoch's draws; images are numbered on from one to the next."""
        starts = [sum(len(draw.prompts) for draw in draws[:i]) for i in range(len(draws))]
        return cls(
            prompts=PromptBatch.cat([draw.prompts for draw in draws]),
            batches=[batch for draw in draws for batch in draw.batches],
            rewards=RewardTable.cat([draw.rewards for draw in draws]),
            local_images=torch.cat([draw.local_images + start for draw, start in zip(draws, starts, strict=True)]),
        )
