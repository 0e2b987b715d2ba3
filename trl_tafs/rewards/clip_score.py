"""CLIP score: cosine similarity of image and prompt (Hessel et al. 2021), by open_clip."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class ClipScore:
    """Cosine of open_clip's image and text embeddings, times `scale` (the paper's tables: 100).

    Preprocessing stays on the tensor: bicubic resize with antialiasing to the model's size, centre crop, and the
    model's own mean and deviation.

    Args:
        model_name: any open_clip architecture.
        pretrained: its weights' tag or a local file; None for random weights.
        device: by default CUDA where there is one.
    """

    def __init__(
        self,
        model_name: str = "ViT-L-14",
        pretrained: str | None = "openai",
        device: str | None = None,
        scale: float = 1.0,
        batch_size: int = 32,
    ) -> None:
        import open_clip

        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # this process's, before Accelerate has set it
        self.device = device or (local if torch.cuda.is_available() else "cpu")
        tag = (open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained else None) or {}
        config = {"force_quick_gelu": True} if tag.get("quick_gelu") else {}  # OpenAI's weights; else only a warning
        self.model = open_clip.create_model(model_name, pretrained=pretrained, device=self.device, **config).eval()
        self.model.requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model_name)
        self.scale, self.batch_size = scale, batch_size

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the model's input, float32."""
        config = getattr(self.model.visual, "preprocess_cfg", None) or {}
        size = self.model.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        factor = max(height / images.shape[2], width / images.shape[3])
        resized = [max(height, round(images.shape[2] * factor)), max(width, round(images.shape[3] * factor))]
        if config.get("resize_mode") == "squash":
            resized = [height, width]
        mode = config.get("interpolation", "bicubic")
        images = F.interpolate(images, size=resized, mode=mode, antialias=True).clamp(0, 1)
        top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
        images = images[:, :, top : top + height, left : left + width]
        mean = images.new_tensor(self.model.visual.image_mean or (0.48145466, 0.4578275, 0.40821073))
        std = images.new_tensor(self.model.visual.image_std or (0.26862954, 0.26130258, 0.27577711))
        return (images - mean[:, None, None]) / std[:, None, None]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B,) on the CPU."""
        scores = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = self.preprocess(images[rows].to(self.device, torch.float32))
            tokens = self.tokenizer(list(prompts[rows])).to(self.device)
            image = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
            text = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
            scores.append((image * text).sum(-1).cpu())
        return self.scale * torch.cat(scores)
