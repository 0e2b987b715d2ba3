"""Images and questions as the input of a vision-language model of the Qwen-VL family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_tafs.rewards.preprocessing import resize, to_uint8

MAX_RATIO = 200  # of the sides, that the models take
REWARD_TOKEN = "<|Reward|>"  # where HPSv3 and EditReward read their score


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) as Qwen-VL resizes: multiples of `factor`, the area within the bounds, the ratio kept."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"an image of {height} x {width} is longer than {MAX_RATIO} times its other side")
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(side / scale / factor) * factor for side in (height, width))
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return max(factor, rows), max(factor, columns)


def chat_inputs(
    processor: Any, pictures: Sequence[Sequence[Tensor]], texts: Sequence[str], min_pixels: int, max_pixels: int
) -> dict[str, Tensor]:
    """Return the model's inputs for B user turns, each of its pictures and then its text, padded to the longest.

    Args:
        processor: of the model, with its chat template.
        pictures: B lists of images (3, H, W) in [0, 1], as many each.
        texts: B.
        min_pixels: of a resized image.
        max_pixels: of a resized image.
    """
    from PIL import Image

    images = processor.image_processor
    factor = images.patch_size * images.merge_size
    shown = []
    for picture in (picture for several in pictures for picture in several):
        size = smart_size(picture.shape[1], picture.shape[2], factor, min_pixels, max_pixels)
        shown.append(Image.fromarray(to_uint8(resize(picture[None].cpu(), size))[0].numpy()))
    turns = [
        [{"role": "user", "content": [*({"type": "image"} for _ in several), {"type": "text", "text": text}]}]
        for several, text in zip(pictures, texts, strict=True)
    ]
    prompts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return dict(processor(text=prompts, images=shown, padding=True, return_tensors="pt", do_resize=False))


def moved(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return inputs on a device, pixels in the model's dtype."""
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def rank_head(width: int, outputs: int = 2) -> nn.Sequential:
    """Return the MLP width-1024-16-outputs, layers numbered as in the checkpoints (with dropout)."""
    return nn.Sequential(
        *(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05)),
        *(nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, outputs)),
    )


def reward_processor(base: str) -> Any:
    """Return a base model's processor, padding on the right, that knows the token at which a score is read."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    return processor


def backbone(base: str, vocabulary: int, state: dict[str, Tensor]) -> nn.Module:
    """Return a Qwen-VL model without its language head, of the configuration of `base`, holding a checkpoint's weights.

    Args:
        base: the Hub's repository or a folder, of which the configuration alone is read.
        vocabulary: tokens, with those that were added.
        state: of the checkpoint, by the names of transformers before 4.52 (`visual.`, `model.`) or later.

    Raises:
        ValueError: weights are missing, or of other shapes.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(base)
    config.get_text_config().vocab_size = vocabulary
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config)
    named = {}
    for name, weight in state.items():
        if name.startswith(("lm_head.", "rm_head")):
            continue
        name = name.removeprefix("model.")
        named[name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}"] = weight
    try:
        missing, unknown = model.load_state_dict(named, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint isn't of {base}: {error}") from error
    if missing or unknown:
        raise ValueError(f"the checkpoint isn't of {base}: missing {missing[:3]}, unknown {unknown[:3]}")
    return model


def plain_positions(mask: Tensor) -> Tensor:
    """Return positions (3, B, L) that count tokens alone: the rewards' official code gives their images no places."""
    return torch.arange(mask.shape[1], device=mask.device).expand(3, *mask.shape)
