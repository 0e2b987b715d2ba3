"""How much of the source picture an edit leaves as it was, pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trl_tafs.output.pictures import as_images
from trl_tafs.rewards.preprocessing import resize


def source_of(metadata: Mapping[str, Any], reward: str) -> Any:
    """Return an image's source, the first of several; raise ValueError if its metadata have none."""
    found = metadata.get("source_image")
    if found is None and metadata.get("source_images"):
        found = metadata["source_images"][0]
    if found is None:
        raise ValueError(f"{reward} compares with a source picture, and there is no source_image among the metadata")
    return found


def as_tensor(picture: Any) -> Tensor:
    """Return a picture as (3, H, W) in [0, 1]."""
    import numpy as np

    (image,) = as_images(picture)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class PixelFaithfulness:
    """1 minus the mean absolute difference to the source picture, in [0, 1]: 1 is a copy, so never the only reward.

    The source is resized to the image. A prompt's `edit_mask` in the metadata, an image or an array of height and width
    that is above one half where the edit is to be, leaves that part out; without one every pixel counts.

    Args:
        blur: pixels of a box filter over both before they are compared, odd; 1: none. It forgives fine noise.
    """

    __name__ = "pixel_faithfulness"
    title = "Faithfulness"

    def __init__(self, blur: int = 1) -> None:
        if blur < 1 or blur % 2 == 0:
            raise ValueError(f"pixel_faithfulness: blur is {blur}; use an odd number of pixels, 1 for none")
        self.blur = blur

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Raise ValueError for a row without a source picture."""
        source_of(metadata, "pixel_faithfulness")
        return True

    def _smooth(self, image: Tensor) -> Tensor:
        return functional.avg_pool2d(image[None], self.blur, 1, self.blur // 2, count_include_pad=False)[0]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores (B,); NaN where the mask leaves no pixel."""
        scores = []
        for image, row in zip(images.float().cpu(), metadata, strict=True):
            size = (image.shape[1], image.shape[2])
            source = resize(as_tensor(source_of(row, "pixel_faithfulness"))[None], size)[0]
            difference = (self._smooth(image) - self._smooth(source)).abs().mean(0)
            if row.get("edit_mask") is not None:
                mask = resize(as_tensor(row["edit_mask"])[None], size)[0].mean(0) > 0.5
                difference = difference[~mask]
            scores.append(1 - difference.mean() if difference.numel() else torch.tensor(torch.nan))
        return torch.stack(scores)
