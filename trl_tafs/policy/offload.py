"""Models that take turns on the device, so that a card holds only the one that works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Turns:
    """The models of a pipeline take turns on the device: while there are guests, the denoiser is away.

    Its trained parameters stay: the optimizer and DDP know where they are.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        self.denoiser, self.device, self.away = denoiser, device, torch.device("cpu")
        self.guests: list[nn.Module] = []

    @contextmanager
    def __call__(self, modules: list[nn.Module]) -> Iterator[None]:
        """A context in which `modules` are on the device; it may be entered within itself."""
        arriving = [module for module in modules if module not in self.guests]
        if arriving and not self.guests:
            move_frozen(self.denoiser, self.away)
        for module in arriving:
            self.guests.append(module.to(self.device))
        try:
            yield
        finally:
            for module in arriving:
                self.guests.remove(module.to(self.away))
            if arriving and not self.guests:
                move_frozen(self.denoiser, self.device)


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """All of a module but its trained parameters."""
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad]


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move them, in place."""
    for tensor in frozen_tensors(module):
        tensor.data = tensor.data.to(device)
