"""The 1,797 handwritten digits that ship with scikit-learn, their split, and the prompts that name them.

The split is a fixed stratified shuffle, half, a quarter and a quarter:

    base      898  pre-trains the generator
    reward    449  trains the rewarding classifier; the generator's held-out flow loss is measured on it
    held_out  450  trains the held-out judge ("other data")

The three are disjoint. `reference` is base and reward together, all that the held-out judge was not trained
on: the real digits that fidelity and diversity compare with (what the generator saw included, as for FID).
"""

from functools import lru_cache

import torch
from digits_components import DIGIT_WORDS
from torch import Tensor

TEMPLATES = ("a handwritten {}", "the digit {}", "a {} written by hand", "the handwritten number {}")
SPLIT_SEED = 0
SHARES = {"base": 0.5, "reward": 0.25, "held_out": 0.25}
SPLITS = ("base", "reward", "held_out", "reference", "all")


def prompt_for(digit: int, template: int = 0) -> str:
    """`prompt_for(7)` is "a handwritten seven"."""
    return TEMPLATES[template].format(DIGIT_WORDS[digit])


def digit_of(prompt: str) -> int:
    """The digit a prompt asks for."""
    found = [DIGIT_WORDS.index(word) for word in prompt.lower().split() if word in DIGIT_WORDS]
    if len(found) != 1:
        raise ValueError(f"the prompt {prompt!r} names {len(found)} of {DIGIT_WORDS}; name one")
    return found[0]


def load_digits():
    """What scikit-learn ships: images and labels."""
    from sklearn.datasets import load_digits

    return load_digits()


@lru_cache
def _split() -> dict[str, Tensor]:
    """Indices of each split, every digit shared out in the same proportions."""
    target = torch.as_tensor(load_digits().target)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[Tensor]] = {name: [] for name in SHARES}
    for digit in range(10):
        indices = torch.nonzero(target == digit).flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        bounds = [round(len(indices) * share) for share in (0.5, 0.75)]
        for name, part in zip(SHARES, indices.tensor_split(bounds), strict=True):
            parts[name].append(part)
    split = {name: torch.cat(part) for name, part in parts.items()}
    split["reference"] = torch.cat([split["base"], split["reward"]])
    split["all"] = torch.arange(len(target))
    return split


def load_split(name: str = "all") -> tuple[Tensor, Tensor]:
    """Images (B, 3, 8, 8) float32 in [0, 1], white on black, and labels (B,) of one of SPLITS."""
    if name not in SPLITS:
        raise ValueError(f"no split {name!r}; there are {SPLITS}")
    digits, indices = load_digits(), _split()[name]
    gray = torch.as_tensor(digits.images, dtype=torch.float32)[indices] / 16
    return gray[:, None].expand(-1, 3, -1, -1).contiguous(), torch.as_tensor(digits.target)[indices]
