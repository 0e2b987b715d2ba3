"""A small decoder in the VAE's place, for images that only rewards see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from trl_tafs.output.errors import shown
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.packed import PackedLatents


@dataclass(frozen=True)
class TinyDecoder:
    """Diffusers' `AutoencoderTiny`, such as `madebyollin/taesd3`: it decodes what the denoiser predicts as it is."""

    pipeline: TAFSPipelineMixin
    model: Any

    @classmethod
    def load(cls, pipeline: TAFSPipelineMixin, name: str, device: torch.device) -> TinyDecoder:
        """Load it from a folder or the Hub, onto a device, in the VAE's dtype.

        Raises:
            ValueError: there is none, or it isn't one of this pipeline's latents.
        """
        try:
            model = AutoencoderTiny.from_pretrained(name, dtype=pipeline.vae.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tiny_decoder={shown(name)} can't be loaded as an AutoencoderTiny: {error}. Give a folder or a Hub "
                "name, such as madebyollin/taesd3 for Stable Diffusion 3 and madebyollin/taef1 for FLUX.1"
            ) from error
        decoder = cls(pipeline, model.eval().requires_grad_(False).to(device))
        decoder.check(name)
        return decoder

    def check(self, name: str) -> None:
        """Compare channels and factor with those of the pipeline's latents.

        Raises:
            ValueError: they differ, or the pipeline's VAE is of another kind than tiny decoders are made for.
        """
        if not isinstance(self.pipeline.vae, AutoencoderKL):
            raise ValueError(
                f"tiny_decoder={shown(name)} can't stand in for the {type(self.pipeline.vae).__name__} of "
                f"{type(self.pipeline).__name__}, only for an AutoencoderKL; leave it out"
            )
        size, config = 16 * self.pipeline.size_multiple, self.model.config
        channels = self.latents(torch.zeros(1, *self.pipeline.latent_shape(size, size))).shape[1]
        found = config.latent_channels, 2 ** (len(config.decoder_block_out_channels) - 1)
        if found != (channels, self.pipeline.vae_scale_factor):
            raise ValueError(
                f"tiny_decoder={shown(name)} decodes {found[0]} channels at 1 / {found[1]} of the image's size; the "
                f"latents of {type(self.pipeline).__name__} have {channels} at 1 / {self.pipeline.vae_scale_factor}. "
                "Take the tiny decoder of this family, or none"
            )

    def latents(self, latents: Tensor) -> Tensor:
        """Latents (B, *) as the denoiser has them to (B, C, H / f, W / f), scaled."""
        return self.pipeline.unpacked(latents) if isinstance(self.pipeline, PackedLatents) else latents

    @torch.no_grad()
    def decode_in_batches(self, latents: Tensor, batch_size: int) -> Tensor:
        """Latents (B, *) to images (B, 3, H, W) on the CPU, float32 in [0, 1], `batch_size` at a time."""
        config, images = self.model.config, []
        for chunk in latents.split(batch_size):
            x = self.latents(chunk.to(self.model.dtype)) / config.scaling_factor + config.shift_factor
            images.append(self.pipeline.pixels(self.model.decode(x, return_dict=False)[0]).cpu())
        return torch.cat(images)
