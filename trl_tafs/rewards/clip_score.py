"""CLIP score: cosine similarity of image and prompt (Hessel et al. 2021), by open_clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trl_tafs.rewards.model import ModelReward, load_open_clip
from trl_tafs.rewards.preprocessing import CLIP_MEAN, CLIP_STD, center_crop, normalize, resize, resize_shortest


def open_clip_pixels(images: Tensor, visual: nn.Module) -> Tensor:
    """Turn images (B, 3, H, W) in [0, 1] into the input of one of open_clip's vision towers, float32.

    Bicubic resize with antialiasing to the model's size, centre crop, and the model's own mean and deviation.
    """
    config = getattr(visual, "preprocess_cfg", None) or {}
    size = visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    mode = config.get("interpolation", "bicubic")
    if config.get("resize_mode") == "squash" or height != width:
        images = resize(images, (height, width), mode=mode)
    else:
        images = resize_shortest(images, height, mode=mode)
    images = center_crop(images, (height, width))
    return normalize(images, visual.image_mean or CLIP_MEAN, visual.image_std or CLIP_STD)


def cosine(image: Tensor, text: Tensor) -> Tensor:
    """Return the cosine of embeddings (B, C) and (B, C), in float32: (B,)."""
    return (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(-1)


class ClipScore(ModelReward):
    """Cosine of open_clip's image and text embeddings, times `scale`.

    Args:
        model_name: any open_clip architecture.
        pretrained: its weights' tag or a local file; None for random weights.
        scale: 100 gives the numbers of the paper's tables.
        options: see `ModelReward`.
    """

    title = "CLIP"
    parameters = 428_000_000
    evaluation_options = {"scale": 100.0}  # as the papers' tables have it

    def __init__(
        self, model_name: str = "ViT-L-14", pretrained: str | None = "openai", scale: float = 1.0, **options: Any
    ) -> None:
        super().__init__(**options)
        import open_clip

        self.model = self.adopt(load_open_clip(model_name, pretrained))
        self.tokenizer = open_clip.get_tokenizer(model_name)
        self.scale = scale

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [0, 1] into the model's input, float32."""
        return open_clip_pixels(images, self.model.visual)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        image = self.model.encode_image(self.preprocess(images).to(self.dtype))
        text = self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))
        return self.scale * cosine(image, text)
