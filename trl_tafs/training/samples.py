"""Show an epoch's samples: a grid on disk, and the user's hook."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_tafs.output.pictures import sample_grid, save_png
from trl_tafs.rewards.scoring import copy_metadata
from trl_tafs.training.experience import Experience, ScoredBatch
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.trackers import LocalTracker


@dataclass
class SampleViewer:
    """Shows the samples of this process; used on the main one."""

    config: TrainingOptions
    accelerator: Accelerator
    local_tracker: LocalTracker
    decode: Callable[[Tensor], Tensor]  # latents (B, *) to images (B, 3, H, W)
    levels: Tensor  # (N + 1,) of the sampler
    hook: Callable[..., Any] | None

    def show(self, experience: Experience, combined: Tensor, epoch: int, global_step: int) -> None:
        """Write the grid, every `sample_grid_freq` epochs, and call the hook with the combined rewards (B, Q, K)."""
        if not self.accelerator.is_main_process:
            return
        frequency = self.config.sample_grid_freq
        if frequency and epoch % frequency == 0:
            path = Path(self.config.project_dir) / "samples" / f"epoch_{epoch:06d}.png"
            self.save_grid(experience.batches, path, f"clean estimates, epoch {epoch}")
        if self.hook is not None:
            self._call_hook(experience, combined, global_step)

    def save_grid(self, batches: Sequence[ScoredBatch], path: Path, title: str) -> None:
        """Draw an image of each of the first prompts, its clean estimate at every step: a row a prompt."""
        chosen, seen = [], set()
        for batch in batches:
            for i, group in enumerate(batch.prompts.group_ids.tolist()):
                if group not in seen and len(chosen) < self.config.sample_grid_rows:
                    seen.add(group)
                    chosen.append((batch, i))
        clean = torch.stack([batch.rollout.clean[i] for batch, i in chosen])  # (P, N, *)
        if not clean.shape[1]:  # rollouts of an interrupted epoch, kept when no grid was asked for
            return
        images = self.decode(clean.flatten(0, 1).to(self.accelerator.device)).unflatten(0, clean.shape[:2])
        columns = [f"{n + 1}: s={s:.2f}" for n, s in enumerate(self.levels[:-1].tolist())]
        labels = [batch.prompts.prompts[i] for batch, i in chosen]
        save_png(sample_grid(images, labels, columns, title), path)

    def _call_hook(self, experience: Experience, combined: Tensor, global_step: int) -> None:
        sizes = [len(batch.prompts) for batch in experience.batches]
        # float32 of its own, as images and metadata are the hook's own
        final = experience.local(combined)[:, -1, 0].to(torch.float32, copy=True).split(sizes)
        shown = [
            [b.images, b.prompts.prompts, tuple(map(copy_metadata, b.prompts.metadata)), rewards, b.metadata]
            for b, rewards in zip(experience.batches, final, strict=True)
        ]
        trackers = [t for t in self.accelerator.trackers if t is not self.local_tracker]
        try:
            self.hook(shown, global_step, trackers[0] if trackers else self.local_tracker)
        except Exception as error:  # scored rollouts are worth more than a picture, and other processes wait
            warnings.warn(
                f"image_samples_hook failed ({type(error).__name__}: {error}); training goes on", stacklevel=2
            )
