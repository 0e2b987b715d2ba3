"""Latents whose patches are packed into tokens, as FLUX and its relatives have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trl_tafs.method.types import onto


class PackedLatents:
    """Latents whose 2x2 patches are packed into tokens: (B, H / 2f, W / 2f, 4C), f the VAE's factor."""

    patch_size = 2

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(rows, columns, 4C)."""
        return height // self.size_multiple, width // self.size_multiple, self.transformer.config.in_channels

    def positions(self, kind: str, x: Tensor, size: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
        """Return the positions of tokens, which are made on the host, and once for a size where x is: see `make`."""
        kept = self.__dict__.setdefault("_positions", {})
        key = (kind, size, x.device, x.dtype, getattr(x, "fake_mode", None), torch.is_inference_mode_enabled())
        if key not in kept:
            kept[key] = onto(make(), x.device)
        return kept[key]

    def unpacked(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), or what else the stock pipeline unpacks to."""
        _, rows, columns, _ = latents.shape
        multiple = self.size_multiple
        return self._unpack_latents(latents.flatten(1, 2), rows * multiple, columns * multiple, self.vae_scale_factor)
