"""Human Preference Score v2.0 and v2.1 (Wu et al. 2023): open_clip's ViT-H-14 with the authors' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.clip_score import cosine
from trl_tafs.rewards.model import ModelReward, hub_file, load_open_clip
from trl_tafs.rewards.preprocessing import center_crop, normalize, resize_shortest

HPS_V2 = "xswu/HPSv2"
CHECKPOINTS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(ModelReward):
    """The plain cosine of image and prompt, without logit scale; about .2 to .35.

    As in the authors' code, the float tensor is resized, so the overshoot of the bicubic filter stays.

    Args:
        version: "v2.1" (the papers' HPSv2.1) or "v2.0".
        checkpoint: the Hub's repository, a folder or a file of the weights.
        model_name: open_clip's architecture.
        options: see `ModelReward`.
    """

    title = "HPSv2.1"  # of the version
    parameters = 986_000_000

    def __init__(
        self, version: str = "v2.1", checkpoint: str = HPS_V2, model_name: str = "ViT-H-14", **options: Any
    ) -> None:
        if version not in CHECKPOINTS:
            raise ValueError(f"hps_v2's version is {version!r}; use one of {', '.join(CHECKPOINTS)}")
        super().__init__(**options)
        self.title = f"HPS{version}"
        import open_clip

        model = load_open_clip(model_name, None)
        state = torch.load(hub_file(checkpoint, CHECKPOINTS[version]), map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
        self.model, self.tokenizer = self.adopt(model), open_clip.get_tokenizer(model_name)

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [0, 1] into the model's input, float32."""
        size = self.model.visual.image_size
        size = size[0] if isinstance(size, (tuple, list)) else size
        return normalize(center_crop(resize_shortest(images, size, eight_bit=False), (size, size)))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        image = self.model.encode_image(self.preprocess(images).to(self.dtype))
        text = self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))
        return cosine(image, text)
