"""Images as JSON and back, for rewards in another process: PNG or raw bytes in base64, never pickle."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.rewards.preprocessing import to_uint8

SECRET = "TRL_TAFS_REWARD_SECRET"  # the environment variable that both sides read
FORMATS = ("png", "raw")
MAX_PIXELS = 4096 * 4096  # of one image


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_images(images: Tensor, format: str = "png") -> dict[str, Any]:
    """Images (B, 3, H, W) in [0, 1] as JSON values: "png" rounds to 8 bits, "raw" keeps float32 exactly."""
    if format == "png":
        data = [png(image) for image in to_uint8(images).numpy()]
    else:
        data = [image.tobytes() for image in images.float().cpu().contiguous().numpy().astype("<f4")]
    texts = [base64.b64encode(item).decode("ascii") for item in data]
    return {"format": format, "shape": list(images.shape[1:]), "images": texts}


def decode_images(message: Mapping[str, Any]) -> Tensor:
    """What `encode_images` made, as (B, 3, H, W) float32.

    Raises:
        ValueError: the message isn't of that form, or an image is larger than `MAX_PIXELS`.
    """
    shape, format, texts = message.get("shape"), message.get("format"), message.get("images")
    if format not in FORMATS or not isinstance(texts, list) or not texts:
        raise ValueError(f"a request needs images, and a format of {' or '.join(FORMATS)}; got format {format!r}")
    if not (isinstance(shape, list) and len(shape) == 3 and shape[0] == 3 and all(isinstance(n, int) for n in shape)):
        raise ValueError(f"a request's shape must be [3, H, W], got {shape!r}")
    if not 0 < shape[1] * shape[2] <= MAX_PIXELS or min(shape) < 1:
        raise ValueError(f"an image of {shape[1]} x {shape[2]} pixels; at most {MAX_PIXELS} are taken")
    try:
        data = [base64.b64decode(text, validate=True) for text in texts]
        decode = _from_png if format == "png" else _from_raw
        return torch.stack([decode(item, tuple(shape)) for item in data])
    except (ValueError, TypeError, OSError) as error:  # whatever a stranger sent
        raise ValueError(f"an image can't be decoded: {error}") from error


def _from_png(data: bytes, shape: Sequence[int]) -> Tensor:
    from PIL import Image

    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    if picture.size != (shape[2], shape[1]):
        raise ValueError(f"a PNG of {picture.size[1]} x {picture.size[0]} where {shape[1]} x {shape[2]} was announced")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _from_raw(data: bytes, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(shape).copy())


def encode_rewards(values: Tensor) -> list[float | None]:
    """(B,) as JSON numbers; null for no verdict."""
    return [None if value != value else value for value in values.double().tolist()]
