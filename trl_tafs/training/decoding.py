"""Clean latents to images: by the VAE or, where only rewards see them, by a tiny decoder that is compared with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.output.errors import first_line, shown
from trl_tafs.output.out_of_memory import MicroBatch
from trl_tafs.pipelines.tiny_decoder import TinyDecoder
from trl_tafs.policy.policy import Policy
from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.training.logs import warn_main
from trl_tafs.training.options import TrainingOptions

ALIKE = 0.9  # correlation of a reward of both decoders' images below which is warned


@dataclass
class ImageDecoder:
    """Decodes on this process, a few images at a time."""

    config: TrainingOptions
    policy: Policy
    tiny: TinyDecoder | None = None
    batch: MicroBatch | None = None  # None: of `decode_size` images
    compared: bool = False

    @classmethod
    def of(cls, config: TrainingOptions, policy: Policy, scored_steps: int) -> ImageDecoder:
        """With the tiny decoder that the options name, if they do; a rollout has so many scored steps.

        Raises:
            ValueError: it can't be used, or would decode nothing.
        """
        if config.tiny_decoder is None:
            return cls(config, policy)
        if scored_steps == 1 and config.tiny_decoder_steps == "intermediate":
            raise ValueError(
                f"tiny_decoder={shown(config.tiny_decoder)} has no effect: only the last step is scored, and with "
                "tiny_decoder_steps='intermediate' the VAE decodes that one; use 'all', or leave tiny_decoder out"
            )
        return cls(config, policy, TinyDecoder.load(policy.pipeline, config.tiny_decoder, policy.accelerator.device))

    def __call__(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W) on the CPU, by the VAE or by the tiny decoder."""
        self.batch = self.batch or MicroBatch(self.config.decode_size, "decoding", "decode_batch_size")
        decoder = self.tiny if tiny and self.tiny is not None else self.policy.pipeline
        with self.policy.devices.decoding():
            return self.batch(lambda size: decoder.decode_in_batches(latents, size))

    def is_tiny(self, last: bool) -> bool:
        """Whether the tiny decoder decodes the clean images of a scored step, the last one or an earlier."""
        return self.tiny is not None and (not last or self.config.tiny_decoder_steps == "all")

    def compare(
        self,
        rewards: RewardSet,
        latents: Tensor,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
    ) -> None:
        """Say once, on the main process, how far the rewards of the tiny decoder's images follow those of the VAE's.

        Costs one decoding and two calls of the rewards; a reward that raises is left to the call that counts.

        Args:
            rewards: of training.
            latents: (B, *) of one step.
            images: (B, 3, H, W) what the tiny decoder made of them.
            prompts: of the images.
            metadata: of the images.
        """
        if self.compared or not self.policy.accelerator.is_main_process:
            return
        self.compared = True
        try:
            found = [rewards(item, prompts, metadata).values for item in (images, self(latents))]
        except Exception as error:
            warn_main(self.policy.accelerator, f"the tiny decoder wasn't compared with the VAE: {first_line(error)}")
            return
        shares = correlations(*found)
        told = ", ".join(f"{name} {share:.3f}" for name, share in zip(rewards.names, shares, strict=True))
        said = f"rewards of {len(images)} images by the tiny decoder and by the VAE correlate by: {told}"
        self.policy.accelerator.print(said)
        if low := [name for name, share in zip(rewards.names, shares, strict=True) if share < ALIKE]:
            warn_main(
                self.policy.accelerator,
                f"{said}. Below {ALIKE} the tiny decoder teaches something else ({', '.join(low)}): leave out "
                "tiny_decoder, or use tiny_decoder_steps='intermediate'",
            )


def correlations(first: Tensor, second: Tensor) -> list[float]:
    """Pearson's r of each column of two (B, R), over the rows that both have; NaN where one doesn't vary."""
    shares = []
    for a, b in zip(first.double().unbind(1), second.double().unbind(1), strict=True):
        known = ~(a.isnan() | b.isnan())
        pair = torch.stack([a[known], b[known]])
        varies = pair.shape[1] > 1 and bool((pair.std(1) > 0).all())
        shares.append(torch.corrcoef(pair)[0, 1].item() if varies else math.nan)
    return shares
