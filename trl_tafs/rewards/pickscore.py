"""PickScore: a CLIP that was trained on people's choices (Kirstain et al. 2023), by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trl_tafs.rewards.clip_score import cosine
from trl_tafs.rewards.model import ModelReward
from trl_tafs.rewards.preprocessing import center_crop, normalize, resize_shortest

PICKSCORE = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose tokenizer it was trained with


class PickScore(ModelReward):
    """`exp(logit_scale) * cosine` of the image's and the prompt's embeddings; with PickScore_v1 about 18 to 26.

    Args:
        model: a CLIPModel on the Hub or in a local folder.
        tokenizer: likewise; by default the one that PickScore_v1 was trained with, or that in the folder `model`.
        logit_scale: False for the plain cosine.
        options: see `ModelReward`.
    """

    title = "PickScore"
    parameters = 986_000_000

    def __init__(
        self, model: str = PICKSCORE, tokenizer: str | None = None, logit_scale: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        from transformers import AutoTokenizer, CLIPModel

        self.model = self.adopt(CLIPModel.from_pretrained(model))
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or (PROCESSOR if model == PICKSCORE else model))
        self.max_length = self.model.config.text_config.max_position_embeddings
        self.logit_scale = logit_scale

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [0, 1] into the model's input, as CLIPImageProcessor does."""
        size = self.model.config.vision_config.image_size
        return normalize(center_crop(resize_shortest(images, size), (size, size), round_offset=False))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        model = self.model
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        pixels = self.preprocess(images).to(self.dtype)
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        scores = cosine(image, model.text_projection(text.pooler_output))
        return model.logit_scale.float().exp() * scores if self.logit_scale else scores
