"""ImageReward (Xu et al. 2023): BLIP's ViT-L and cross-attending BERT by transformers, carrying THUDM's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_tafs.rewards.model import ModelReward, hub_file
from trl_tafs.rewards.preprocessing import center_crop, normalize, resize_shortest

IMAGE_REWARD, CHECKPOINT = "THUDM/ImageReward", "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores on the authors' validation set
MAX_LENGTH = 35  # tokens
HEAD_SIZES = (1024, 128, 64, 16, 1)

VISION_NAMES = (  # (official, transformers), as regular expressions
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return THUDM's checkpoint as three state dicts: `vision` and `text` by transformers' names, and `head`.

    What scoring doesn't use (the projections, position ids) is left out.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in VISION_NAMES:
                name = re.sub(pattern, replacement, name)
            parts["vision"][name] = tensor
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            parts["text"][name.removeprefix("blip.text_encoder.")] = tensor
        elif name.startswith("mlp.layers."):
            parts["head"][name.removeprefix("mlp.layers.")] = tensor
    missing = [name for name, part in parts.items() if not part]
    if missing:
        raise ValueError(f"the checkpoint holds nothing of ImageReward's {', '.join(missing)}; is it ImageReward.pt?")
    return parts


def reward_head(width: int = 768) -> nn.Sequential:
    """Return the MLP 768-1024-128-64-16-1 without activations, layers numbered as in the checkpoint (with dropout)."""
    sizes = [width, *HEAD_SIZES]
    layers: list[nn.Module] = []
    for i in range(len(HEAD_SIZES)):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if i < 3:
            layers.append(nn.Dropout(0.2 if i < 2 else 0.1))
    return nn.Sequential(*layers)


def standardize(scores: Tensor) -> Tensor:
    """Return raw scores on the published scale: (x - mean) / std."""
    return (scores - MEAN) / STD


class ImageReward(ModelReward):
    """The score on the published scale, about -2 to 2.

    Args:
        checkpoint: the Hub's repository, a folder or a file of the official weights.
        tokenizer: BERT's, on the Hub or in a local folder.
        vision_config: changes to BLIP ViT-L's configuration, for smaller models.
        text_config: changes to the text encoder's.
        options: see `ModelReward`.
    """

    title = "ImageReward"
    parameters = 447_000_000

    def __init__(
        self,
        checkpoint: str = IMAGE_REWARD,
        tokenizer: str = "bert-base-uncased",
        vision_config: Mapping[str, Any] | None = None,
        text_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, **(vision_config or {})}
        text = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        text |= {
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "encoder_hidden_size": vision["hidden_size"],
        }
        text |= {"is_decoder": True, **(text_config or {})}  # with cross-attention; the mask stays bidirectional
        state = transformers_names(torch.load(hub_file(checkpoint, CHECKPOINT), map_location="cpu", weights_only=True))
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.head = reward_head(text["hidden_size"])
        for module, part in ((self.vision, "vision"), (self.text, "text"), (self.head, "head")):
            module.load_state_dict(state[part])
            self.adopt(module)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.image_size = vision["image_size"]

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [0, 1] into the model's input, float32."""
        size = self.image_size
        return normalize(center_crop(resize_shortest(images, size), (size, size)))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(self.device)
        seen = self.vision(pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        return standardize(self.head(read).float().squeeze(-1))
