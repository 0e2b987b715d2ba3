"""Images as JSON and back, for rewards in another process: PNG or raw bytes in base64, never pickle."""

from __future__ import annotations

import base64
import io
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.rewards.preprocessing import to_uint8

SECRET = "TRL_TAFS_REWARD_SECRET"  # the environment variable that both sides read
FORMATS = ("png", "raw")
PICTURE = "png_base64"  # the only key of a picture among metadata
MAX_PIXELS = 4096 * 4096  # of one image
MAX_TOTAL_PIXELS = 2**26  # of a request's images together: 64 of 1024 x 1024; 768 MiB as float32


def png(image: np.ndarray) -> bytes:
    """Return an image (H, W, 3) uint8 as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_images(images: Tensor, format: str = "png") -> dict[str, Any]:
    """Return images (B, 3, H, W) in [0, 1] as JSON values: "png" rounds to 8 bits, "raw" keeps float32 exactly."""
    if format == "png":
        data = [png(image) for image in to_uint8(images).numpy()]
    else:
        data = [image.tobytes() for image in images.float().cpu().contiguous().numpy().astype("<f4")]
    texts = [base64.b64encode(item).decode("ascii") for item in data]
    return {"format": format, "shape": list(images.shape[1:]), "images": texts}


def decode_images(message: Mapping[str, Any]) -> Tensor:
    """Return what `encode_images` made as (B, 3, H, W) float32.

    Raises:
        ValueError: the message isn't of that form, an image has more than `MAX_PIXELS`, or all together more than
            `MAX_TOTAL_PIXELS`, as the message announces and each PNG's header must confirm before it is decoded.
    """
    shape, format, texts = message.get("shape"), message.get("format"), message.get("images")
    if not isinstance(format, str) or format not in FORMATS or not isinstance(texts, list) or not texts:
        raise ValueError(f"a request needs images, and a format of {' or '.join(FORMATS)}; got format {format!r:.40}")
    sides = [n for n in shape if type(n) is int and 0 < n <= MAX_PIXELS] if isinstance(shape, list) else []
    if len(sides) != 3 or shape != sides or sides[0] != 3:
        raise ValueError(
            f"a request's shape must be [3, H, W] of at most {MAX_PIXELS} pixels, got {reprlib.repr(shape)}"
        )
    pixels = shape[1] * shape[2]
    if pixels > MAX_PIXELS or pixels * len(texts) > MAX_TOTAL_PIXELS:
        raise ValueError(
            f"{len(texts)} images of {shape[1]} x {shape[2]} pixels; at most {MAX_PIXELS} an image and "
            f"{MAX_TOTAL_PIXELS} together are taken"
        )
    decode, images = _from_png if format == "png" else _from_raw, torch.empty(len(texts), *shape)
    for image, text in zip(images, texts, strict=True):
        try:
            image.copy_(decode(base64.b64decode(text, validate=True), shape))
        except Exception as error:  # whatever a stranger sent, and whatever Pillow makes of it
            raise ValueError(f"an image can't be decoded: {error}") from error
    return images


def _from_png(data: bytes, shape: Sequence[int]) -> Tensor:
    from PIL import Image

    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    if picture.size != (shape[2], shape[1]):
        raise ValueError(f"a PNG of {picture.size[1]} x {picture.size[0]} where {shape[1]} x {shape[2]} was announced")
    if picture.mode.startswith("I"):
        raise ValueError("a PNG of 16 bits a pixel, which would be cut to 8; send format raw")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _from_raw(data: bytes, shape: Sequence[int]) -> Tensor:
    image = torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(shape).copy())
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError("a raw image has values outside of [0, 1]")
    return image


def encode_metadata(metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return metadata as JSON values, its PIL images as `{"png_base64": ...}`; lists of them, too."""
    return [{key: _encoded(value) for key, value in row.items()} for row in metadata]


def _encoded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if not (hasattr(value, "tobytes") and hasattr(value, "getexif")):  # an image of PIL, which isn't loaded for this
        return value
    return {PICTURE: base64.b64encode(png(np.asarray(value.convert("RGB")))).decode("ascii")}


def decode_metadata(metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what `encode_metadata` made, its pictures as PIL images in RGB.

    Raises:
        ValueError: a picture can't be decoded, or all together have more than `MAX_TOTAL_PIXELS`, as each PNG's header
            says before it is decoded.
    """
    left = [MAX_TOTAL_PIXELS]
    return [{key: _decoded(value, left) for key, value in row.items()} for row in metadata]


def _decoded(value: Any, left: list[int]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, left) for item in value]
    if not isinstance(value, dict) or value.keys() != {PICTURE}:
        return value
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(base64.b64decode(value[PICTURE], validate=True)), formats=["PNG"])
        left[0] -= picture.size[0] * picture.size[1]
        if picture.size[0] * picture.size[1] > MAX_PIXELS or left[0] < 0:
            raise ValueError(f"at most {MAX_PIXELS} pixels an image and {MAX_TOTAL_PIXELS} together are taken")
        return picture.convert("RGB")
    except Exception as error:  # whatever a stranger sent, and whatever Pillow makes of it
        raise ValueError(f"a picture among the metadata can't be decoded: {error}") from error


def encode_rewards(values: Tensor) -> list[float | None]:
    """Return scores (B,) as JSON numbers; null for no score."""
    return [None if value != value else value for value in values.double().tolist()]
