"""Prompts that carry pictures: what is to be edited, or referred to."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCES = ("source_image", "source_images")  # the columns and metadata in which a prompt's pictures are, one or several
TURNED = (5, 6, 7, 8)  # EXIF's orientations that swap height and width


class Picture:
    """A picture of a prompt, read when it is needed, known by its content.

    Args:
        source: a path, a PIL image, or what `datasets` stores of one, a dict with `bytes` or `path`.

    Raises:
        ValueError: anything else.
    """

    def __init__(self, source: Any) -> None:
        from PIL import Image

        if isinstance(source, Mapping) and (source.get("bytes") or source.get("path")):
            source = bytes(source["bytes"]) if source.get("bytes") else source["path"]
        if not isinstance(source, (str, os.PathLike, bytes, Image.Image)):
            raise ValueError(f"a source picture is {type(source).__name__}; give a path or a PIL image")
        self.source = source

    def _opened(self) -> Image:
        from PIL import Image

        if isinstance(self.source, Image.Image):
            return self.source
        try:
            return Image.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)
        except Exception as error:  # of the file system, or of a decoder
            raise ValueError(f"the source picture {self.name} can't be read: {error}") from error

    @property
    def name(self) -> str:
        """What an error calls it."""
        return os.fspath(self.source) if isinstance(self.source, (str, os.PathLike)) else "in memory"

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width, upright; the file's head alone is read."""
        image = self._opened()
        width, height = image.size
        return (width, height) if image.getexif().get(0x0112) in TURNED else (height, width)

    def image(self) -> Image:
        """Return the picture upright and in RGB, a copy, as diffusers' `load_image` reads it."""
        from PIL import ImageOps

        image = self._opened()
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # of a decoder: a file that ends too soon
            raise ValueError(f"the source picture {self.name} can't be read: {error}") from error

    @cached_property
    def digest(self) -> str:
        """Of its pixels, whatever file they are in."""
        image = self.image()
        return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


class PicturedPrompt(str):
    """A prompt with its pictures: its text wherever a text is wanted, and another prompt for other pictures."""

    pictures: tuple[Picture, ...]

    def __new__(cls, text: str, pictures: Sequence[Picture]) -> PicturedPrompt:
        """Make it of at least one picture."""
        made = super().__new__(cls, text)
        made.pictures = tuple(pictures)
        return made

    @cached_property
    def digest(self) -> str:
        """Of its pictures, in their order."""
        return " ".join(picture.digest for picture in self.pictures)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, PicturedPrompt) and str.__eq__(self, other)
        return same and self.digest == other.digest  # type: ignore[attr-defined]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.digest))

    def __repr__(self) -> str:
        return f"{str(self)!r} with {len(self.pictures)} picture{'s' * (len(self.pictures) > 1)} ({self.digest[:16]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PicturedPrompt, (str(self), self.pictures)

    def __deepcopy__(self, memo: Any) -> PicturedPrompt:
        return self


def pictures_of(prompt: str) -> tuple[Picture, ...]:
    """Return a prompt's pictures, none for a text."""
    return getattr(prompt, "pictures", ())


def like(prompt: str, text: str) -> str:
    """Return another text with the pictures of `prompt`."""
    return PicturedPrompt(text, pictures_of(prompt)) if pictures_of(prompt) else text


def prompt_key(prompt: str) -> str:
    """Return what tells prompts apart in a file: the text, and the digest of the pictures where there are any."""
    return f"{str(prompt)}\n{prompt.digest}" if isinstance(prompt, PicturedPrompt) else prompt


def source_pictures(metadata: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Return the pictures that a row names, none if it names none.

    Raises:
        ValueError: they are named twice, or are no pictures.
    """
    given = {name: metadata[name] for name in SOURCES if metadata.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"a prompt has both {' and '.join(given)}; give one of them")
    for name, value in given.items():
        if name == "source_images" and not isinstance(value, (list, tuple)):
            raise ValueError(
                f"source_images is {type(value).__name__}; give a list of pictures, or one in source_image"
            )
        return tuple(map(Picture, value if name == "source_images" else [value]))
    return ()


def pictured(prompt: str, metadata: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a prompt with the pictures that its metadata names, which hold PIL images in RGB from then on.

    Raises:
        ValueError: a picture can't be read.
    """
    pictures = source_pictures(metadata)
    if not pictures:
        return prompt, metadata
    read = [picture.image() for picture in pictures]
    name = next(name for name in SOURCES if metadata.get(name) is not None)
    found = {name: read if name == "source_images" else read[0]}
    return PicturedPrompt(prompt, [Picture(image) for image in read]), metadata | found


def check_pictures(pipeline: Any, pictures: Sequence[Picture], whose: str) -> tuple[tuple[int, int], ...]:
    """Return the sizes of a prompt's pictures, (height, width) each.

    Args:
        pipeline: that is to edit them.
        pictures: of one prompt.
        whose: they are, for an error.

    Raises:
        ValueError: the family takes none, or fewer, or needs one; or a file can't be read.
    """
    most, name = pipeline.max_pictures, pipeline.stock_class().__name__
    if pictures and not most:
        raise ValueError(
            f"{whose} has a source picture, and {name} edits none; take a family that does (docs/editing.md), or name "
            f"the column otherwise than {' or '.join(SOURCES)}"
        )
    if len(pictures) > most:
        raise ValueError(f"{whose} has {len(pictures)} source pictures, and {name} takes {most}")
    if pipeline.needs_pictures and not pictures:
        raise ValueError(f"{whose} has no source_image, and {name} edits pictures; give one")
    try:
        return tuple(picture.size for picture in pictures)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error


def check_source_pictures(pipeline: Any, rows: Any, what: str) -> None:
    """Raise ValueError if a family can't edit the pictures of a fixed set's rows, in one batch.

    Args:
        pipeline: that is to edit them.
        rows: (prompt, metadata) each.
        what: the rows are, for an error.
    """
    first = None
    for number, (_, metadata) in enumerate(rows):
        whose = f"{what}, row {number}"
        try:
            pictures = source_pictures(metadata)
        except ValueError as error:
            raise ValueError(f"{whose}: {error}") from error
        sizes = check_pictures(pipeline, pictures, whose)
        first = sizes if first is None else first
        if sizes != first:
            raise ValueError(
                f"{whose} has source pictures of {_sizes(sizes)} pixels, row 0 of {_sizes(first)}; they go through the "
                "model in one batch: bring all to one size"
            )


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in sizes) or "none"
