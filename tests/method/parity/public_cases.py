"""Tensors by a formula, so that public code and ours can be given the same."""

import json
import math
from pathlib import Path

import torch

FROZEN = Path(__file__).with_name("public.json")
SHAPE = (4, 3, 2, 2)  # four rows
LEVELS = [1.0, 0.9, 0.75, 0.5, 0.0]  # four steps at a shift of 3
STEPS = (0, 1, 2)
ADVANTAGES = [1.5, -0.5, 0.25, -2.0]
REWARDS = [0.9, 0.1, 0.4, 0.8, 0.2, 0.2, 0.7, 1.0]
OTHER_REWARDS = [12.0, 14.5, 13.0, 11.0, 9.0, 16.0, 15.0, 15.5]
WEIGHTS = {"one": 1.0, "two": 0.5}
EPOCHS = 25 * 30
DECAY_STEPS = (0, 1, 250, 500, 501, 2000)
CPS_CLIP = 1e-4
PROMPTS = ["a"] * 4 + ["b"] * 4


def wave(name: str) -> torch.Tensor:
    """The tensor of that name, float32, of about unit size."""
    code = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    position = torch.arange(math.prod(SHAPE), dtype=torch.float64)
    return (1.4 * torch.sin(position * 12.9898 + code)).reshape(SHAPE).float()


def moved() -> torch.Tensor:
    """The velocities of an old policy, a small step from `wave("v")`."""
    return wave("v") + 2e-4 * wave("old")


def frozen(name: str) -> dict:
    """What the public code gave, as `python tests/method/parity/freeze.py` wrote it."""
    return json.loads(FROZEN.read_text())[name]
