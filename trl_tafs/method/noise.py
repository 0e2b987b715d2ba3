"""Noise that belongs to a sample, whatever the batch, process or device; and noise drawn in order."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_tafs.method.types import onto

Noise = Callable[[str, int, tuple[int, ...]], Tensor]


def noise_seed(*key: int | str) -> int:
    """Return a 63-bit seed from (seed, epoch, sample, stream, step): unrelated keys give unrelated streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return struct.unpack("<Q", digest)[0] >> 1


def keyed_normal(keys: Sequence[tuple[int | str, ...]], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal (B, *shape), float32 on the CPU: a row's numbers are those of its key alone."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed(*key))) for key in keys]
    return torch.stack(rows)


@dataclass(frozen=True)
class SampleNoise:
    """Noise that belongs to a sample: every draw has a generator keyed by (seed, epoch, sample, stream, step).

    It is drawn on the CPU, so that it is the same for any device, batch size and number of processes; while a GPU
    still evaluates the step before, since that was asked for first and the copy waits for nothing.
    """

    seed: int
    epoch: int
    sample_ids: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __call__(self, stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape), float32, B the number of sample ids."""
        keys = [(self.seed, self.epoch, sample, stream, step) for sample in self.sample_ids]
        return onto(keyed_normal(keys, shape), self.device)


class SequentialNoise:
    """Noise for a single rollout, drawn in the order of use from one generator (None: the global one)."""

    def __init__(self, batch: int, generator: torch.Generator | None, device: torch.device) -> None:
        self.batch, self.generator, self.device = batch, generator, device

    def __call__(self, stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape)."""
        source = "cpu" if self.generator is None else self.generator.device
        draw = torch.randn((self.batch, *shape), generator=self.generator, device=source)
        return draw.to(self.device)
