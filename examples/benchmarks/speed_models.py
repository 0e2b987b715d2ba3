"""Models of `speed.py`, built from configurations with random weights: nothing is downloaded or encoded."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from trl_tafs import TAFSFluxPipeline, TAFSGRPOConfig, TAFSGRPOTrainer, TAFSStableDiffusion3Pipeline
from trl_tafs.method.types import Conditioning, Embeddings

PROMPTS = ["one", "two"]
LENGTH = {"small": 32, "sd35_medium": 333, "flux1_dev": 512}  # tokens of text

_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SMALL = SD35_MEDIUM | {
    "num_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 256,
    "caption_projection_dim": 512,
    "pooled_projection_dim": 256,
    "dual_attention_layers": (),
    "pos_embed_max_size": 64,
}
FLUX1_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """Return the pipeline `small` (36M weights), `sd35_medium` or `flux1_dev`, without text encoders."""
    torch.manual_seed(0)
    channels = (16, 32, 64, 64) if name == "small" else (128, 256, 512, 512)
    vae = _BLOCKS | _VAE | {"block_out_channels": channels, "layers_per_block": 1 if name == "small" else 2}
    vae |= {"norm_num_groups": 8 if name == "small" else 32, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    kind, config = (
        (FluxTransformer2DModel, FLUX1_DEV)
        if name == "flux1_dev"
        else (SD3Transformer2DModel, SMALL if name == "small" else SD35_MEDIUM)
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that a large model is never there in float32
    try:
        with torch.device(device):
            parts = {"transformer": kind(**config), "vae": AutoencoderKL(**vae)}
    finally:
        torch.set_default_dtype(before)
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)} | dict.fromkeys(encoders)
    if name == "flux1_dev":
        return TAFSFluxPipeline(**parts)
    return TAFSStableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


def conditioning(pipeline: Any, name: str) -> Conditioning:
    """Return a random embedding of one prompt, on the CPU."""
    config, generator = pipeline.transformer.config, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(pipeline.model_dtype)

    guidance = torch.full((1,), 3.5) if name == "flux1_dev" else None
    text = draw(LENGTH[name], config.joint_attention_dim)
    return Conditioning(Embeddings(text, draw(config.pooled_projection_dim), guidance=guidance))


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


def make_trainer(pipeline: Any, name: str, **options: Any) -> TAFSGRPOTrainer:
    """Return a trainer that has its prompts' embeddings already."""
    settings = {"project_kwargs": {"project_dir": tempfile.mkdtemp(prefix="speed_")}, "disable_tqdm": True}
    settings |= {"sample_grid_freq": 0, "picture_freq": 0, "save_freq": 0, "preflight_rollout": False}
    trainer = TAFSGRPOTrainer(TAFSGRPOConfig(**settings | options), brightness, PROMPTS, pipeline)
    if name != "digits":
        trainer.encode.cache.update({prompt: conditioning(pipeline, name) for prompt in PROMPTS})
    return trainer
