"""Tiny models with weights by a formula, and pictures, so that the official code and ours can be given the same."""

import json
import math
import zlib
from pathlib import Path

import torch

PROMPTS = ["a red cat on a mat", "two dogs", "the blue bird above the green house"]
SIZES = [(32, 32), (48, 48), (40, 64)]  # no resizing, down, down with a crop
FROZEN = Path(__file__).with_name("official.json")

CLIP = {  # ViT-H-14's structure, in small
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}  # of ImageReward's BLIP
BERT = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT |= {"max_position_embeddings": 64}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat on mat two dogs the blue bird above green house".split()


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of that name: uniform digits of a fast sine, their deviation 1 / sqrt(fan-in)."""
    code = zlib.crc32(name.encode()) % 9973
    position = torch.arange(math.prod(shape), dtype=torch.float64)
    uniform = 2 * (torch.sin(position * 12.9898 + code * 78.233) * 43758.5453).frac().abs() - 1
    values = uniform.reshape(shape)
    if len(shape) < 2:
        return (0.1 * values + (1.0 if "weight" in name else 0.0)).float()
    return (values * math.sqrt(3 / math.prod(shape[1:]))).float()


def fill(state: dict) -> dict:
    """The state dict with every floating-point tensor by the formula; what has one element stays."""
    return {k: weight(k, tuple(v.shape)) if v.is_floating_point() and v.dim() else v for k, v in state.items()}


def pictures(size: tuple[int, int]) -> torch.Tensor:
    """One picture a prompt, (3, 3, H, W) in steps of 1/255."""
    y, x = (torch.linspace(0, 1, n, dtype=torch.float64) for n in size)
    waves = [
        0.5 + 0.5 * torch.sin((3 + i) * x[None, :] + (5 - c) * (1 + i) * y[:, None] + c + 2 * i)
        for i in range(3)
        for c in range(3)
    ]
    return ((torch.stack(waves).reshape(3, 3, *size) * 255).round() / 255).float()


def vocabulary(folder: Path) -> Path:
    """A BERT vocabulary file of a few words."""
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def frozen(name: str) -> dict[str, list[float]]:
    """The official scores by picture size, as `python tests/parity/freeze.py` wrote them."""
    return json.loads(FROZEN.read_text())[name]
