"""LAION's aesthetic predictor: a linear head or an MLP without activations on CLIP's image embedding.

The MLP is the improved predictor (Schuhmann 2022), DDPO's aesthetic reward; the linear head is the first version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trl_tafs.rewards.clip_score import open_clip_pixels
from trl_tafs.rewards.model import ModelReward, hub_file, load_open_clip

HEAD, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


def aesthetic_head(state: Mapping[str, Tensor]) -> nn.Module:
    """Return the head of a checkpoint: linear layers one after another, as many as it holds.

    The dropout between them does nothing in eval mode, so that its places in the official numbering are skipped.
    """
    weights = {name.rpartition(".")[0]: tensor for name, tensor in state.items() if name.endswith("weight")}
    order = sorted(weights, key=lambda name: int("".join(filter(str.isdigit, name)) or 0))
    layers = []
    for name in order:
        layer = nn.Linear(weights[name].shape[1], weights[name].shape[0])
        prefix = f"{name}." if name else ""
        layer.load_state_dict({part: state[f"{prefix}{part}"].float() for part in ("weight", "bias")})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise ValueError(f"the aesthetic head's checkpoint ends in no single number; it holds {', '.join(state)}")
    return nn.Sequential(*layers)


class Aesthetic(ModelReward):
    """The predicted rating, about 1 to 10; the prompt isn't looked at.

    Args:
        head: the Hub's repository, a folder or a file of the head's weights (`layers.0.weight`, ... or `weight`).
        model_name: open_clip's architecture.
        pretrained: its weights' tag or a local file.
        options: see `ModelReward`.
    """

    parameters = 428_000_000

    def __init__(
        self, head: str = HEAD, model_name: str = "ViT-L-14", pretrained: str | None = "openai", **options: Any
    ) -> None:
        super().__init__(**options)
        self.model = self.adopt(load_open_clip(model_name, pretrained))
        self.head = aesthetic_head(torch.load(hub_file(head, HEAD_FILE), map_location="cpu", weights_only=True))
        self.adopt(self.head)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the ratings, (B,)."""
        embedding = self.model.encode_image(open_clip_pixels(images, self.model.visual).to(self.dtype))
        return self.head(F.normalize(embedding.float(), dim=-1).to(self.dtype)).squeeze(-1)
