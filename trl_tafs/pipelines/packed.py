"""Latents whose patches are packed into tokens, as FLUX and its relatives have them."""

from __future__ import annotations

from torch import Tensor


class PackedLatents:
    """Latents whose 2x2 patches are packed into tokens: (B, H / 2f, W / 2f, 4C), f the VAE's factor."""

    patch_size = 2

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(rows, columns, 4C)."""
        return height // self.size_multiple, width // self.size_multiple, self.transformer.config.in_channels

    def unpacked(self, latents: Tensor) -> Tensor:
        """(B, rows, columns, 4C) to (B, C, H / f, W / f), or what else the stock pipeline unpacks to."""
        _, rows, columns, _ = latents.shape
        multiple = self.size_multiple
        return self._unpack_latents(latents.flatten(1, 2), rows * multiple, columns * multiple, self.vae_scale_factor)
