"""Models that share a device: only those that work are on it, and the VAE tiles while it decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


class DeviceSharing:
    """Where a pipeline's models are while they encode, sample and decode.

    Without sharing, every model stays where it is. With it, text encoders and VAE wait on the CPU, and the denoiser's
    frozen weights make room for them while they work; its trained parameters stay, since optimizer and DDP know where
    they are.

    Args:
        denoiser: the one that makes room.
        device: where models work.
        encoders: text encoders that wait on the CPU; empty without sharing.
        decoders: the VAE, if it waits on the CPU.
        tiled: a VAE that decodes in tiles.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        device: torch.device,
        encoders: Sequence[nn.Module] = (),
        decoders: Sequence[nn.Module] = (),
        tiled: nn.Module | None = None,
    ) -> None:
        self.denoiser, self.device, self.waiting_place = denoiser, device, torch.device("cpu")
        self.encoders, self.decoders, self.tiled = list(encoders), list(decoders), tiled
        self.resident: list[nn.Module] = []  # those that have come to the device

    @property
    def shared(self) -> bool:
        """Whether models wait on the CPU: then an epoch is drawn whole before any of it is decoded."""
        return bool(self.encoders or self.decoders)

    def encoding(self) -> AbstractContextManager[None]:
        """Inside, the text encoders are on the device."""
        return self.on_device(self.encoders) if self.encoders else nullcontext()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, the VAE is on the device, and tiles if it was asked to."""
        tile = self.tiled is not None and not getattr(self.tiled, "use_tiling", False)
        with self.on_device(self.decoders) if self.decoders else nullcontext():
            if tile:
                self.tiled.enable_tiling()
            try:
                yield
            finally:
                if tile:
                    self.tiled.disable_tiling()

    @contextmanager
    def on_device(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, `modules` are on the device; it may be entered within itself."""
        arriving = [module for module in modules if module not in self.resident]
        if arriving and not self.resident:
            move_frozen(self.denoiser, self.waiting_place)
        for module in arriving:
            self.resident.append(module.to(self.device))
        try:
            yield
        finally:
            for module in arriving:
                self.resident.remove(module.to(self.waiting_place))
            if arriving and not self.resident:
                move_frozen(self.denoiser, self.device)


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers of a module but the trained ones."""
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad]


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move a module's frozen tensors, in place."""
    for tensor in frozen_tensors(module):
        tensor.data = tensor.data.to(device)
