"""Who judges scenes: two detectors that share no method, GenEval's rules on what they find, and a taste of its own.

The first detector, whose scores are trained on, is OpenCV's: what differs from the ground, contours, their shape and
mean colour. The second lays drawn icons over each cell and asks which leaves the least of the image unexplained.
Neither learns anything, and no gradient goes through either.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scenes_data import CELL, COLOURS, GRID, KINDS, RADII, Icon, Row, coverage, render

from trl_tafs.rewards.geneval_rules import Detection, judge, keep

SCALE = 4  # by which an image is enlarged before contours are found
LEAST_AREA = 14.0  # pixels of the image; less is a speck
FAR = 38.0  # from the ground, in CIELAB: belongs to an object
SAMPLES = 36  # directions in which an outline's distance from its middle is measured
UNLIKE = 0.16  # mean difference of two outlines' distances, as a share of their size: sure no more
OFF_COLOUR = 45.0  # of an object from the nearest colour, in CIELAB

Found = list[tuple[Detection, str]]  # objects, each with its colour
Detector = Callable[[np.ndarray], Found]  # of an image (32, 32, 3) uint8


def lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB, float32, of RGB in [0, 1], (..., 3)."""
    flat = np.ascontiguousarray(colours, dtype=np.float32).reshape(-1, 1, 3)
    return cv2.cvtColor(flat, cv2.COLOR_RGB2LAB).reshape(colours.shape)


@cache
def palette() -> np.ndarray:
    """The eight colours in CIELAB, (8, 3)."""
    return lab(np.array(list(COLOURS.values()), dtype=np.float32))


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8."""
    return (images.float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


# The first: contours ------------------------------------------------------------------------------------------


def signature(mask: np.ndarray) -> np.ndarray:
    """How far an outline and a hole are from the middle of what it fills, by direction: (2, SAMPLES), 1 on average.

    The second row is the share of each ray inside that is filled: a ring's rays are empty in their inner half.
    """
    ys, xs = np.nonzero(mask)
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    size = max(bottom - top, right - left) / 2
    y, x = (top + bottom) / 2, (left + right) / 2
    angles = 2 * np.pi * np.arange(SAMPLES) / SAMPLES
    steps = np.linspace(0, 1.45, 30)
    rows = np.clip((y + size * steps[None] * np.sin(angles)[:, None]).astype(int), 0, mask.shape[0] - 1)
    columns = np.clip((x + size * steps[None] * np.cos(angles)[:, None]).astype(int), 0, mask.shape[1] - 1)
    inside = mask[rows, columns] > 0
    reach = np.where(inside.any(1), steps[inside.shape[1] - 1 - inside[:, ::-1].argmax(1)], 0.0)
    return np.stack([reach, inside.mean(1) * 1.45])


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image (32, 32, 3) uint8 in CIELAB, SCALE times as large."""
    large = cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)
    return cv2.cvtColor(large.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def object_mask(large: np.ndarray, image: np.ndarray) -> np.ndarray:
    """What differs from the ground, (SCALE H, SCALE W) uint8: the ground is the median of the image."""
    ground = np.median(image.reshape(-1, 3), axis=0) / 255
    distance = np.square(large - lab(ground[None].astype(np.float32))).sum(-1)
    return (distance > FAR**2).astype(np.uint8)


@cache
def signatures() -> np.ndarray:
    """Each kind's signatures at its three sizes, of true images: (24, 2, SAMPLES), kind by kind."""
    found = []
    for kind in KINDS:
        for radius in RADII:
            image = to_uint8(render([Icon(kind, "black", 0, radius)], (0.95, 0.95, 0.95))[None])[0]
            found.append(signature(object_mask(enlarged(image), image)))
    return np.stack(found)


def contours(image: np.ndarray) -> Found:
    """Objects by OpenCV: each outer contour with its box, colour and kind; the less like any kind, the less sure."""
    large = enlarged(image)
    mask = object_mask(large, image)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    found = []
    for outline in outlines:
        x, y, width, height = cv2.boundingRect(outline)
        if width * height < LEAST_AREA * SCALE**2:
            continue
        filled = np.zeros_like(mask)
        cv2.drawContours(filled, [outline], -1, 1, cv2.FILLED)
        own = filled & mask
        if cv2.countNonZero(own) < LEAST_AREA * SCALE**2:
            continue
        differences = np.abs(signatures() - signature(own)).mean((1, 2))
        unlike, kind = float(differences.min()), KINDS[int(differences.argmin()) // len(RADII)]
        colour, off = mean_colour(large, own)
        confidence = float(np.exp(-((unlike / UNLIKE) ** 4) * np.log(2)) * (off < OFF_COLOUR))
        box = (x / SCALE, y / SCALE, (x + width) / SCALE, (y + height) / SCALE)
        found.append((Detection(kind, confidence, box), colour))
    return found


def mean_colour(large: np.ndarray, mask: np.ndarray) -> tuple[str, float]:
    """The name nearest to an object's colour, and how far it is: of its inner half, whose edge pixels are mixed."""
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    inner = depth >= 0.5 * depth.max()
    distances = np.linalg.norm(palette() - np.median(large[inner], axis=0), axis=-1)
    return tuple(COLOURS)[int(distances.argmin())], float(distances.min())


# The second: drawn icons laid over each cell ------------------------------------------------------------------

EXPLAINED = 0.6  # of a cell's difference from the ground, by the best icon
PRESENT = 0.012  # mean squared difference of a cell from the ground


@cache
def drawn_icons() -> tuple[np.ndarray, tuple[tuple[str, float], ...]]:
    """All icons' coverage, (24, 256), and what they are."""
    names = tuple((kind, radius) for kind in KINDS for radius in RADII)
    return np.stack([coverage(*name).reshape(-1) for name in names]), names


def cells(image: np.ndarray) -> Found:
    """Objects by analysis through synthesis: the icon and colour that explain most of each cell."""
    values = image.astype(np.float32) / 255
    ground = np.median(values.reshape(-1, 3), axis=0)
    icons, names = drawn_icons()
    inks = np.array(list(COLOURS.values()), dtype=np.float32) - ground  # (8, 3)
    power = (icons**2).sum(1)[:, None] * (inks**2).sum(1)[None]  # (24, 8)
    found = []
    for cell in range(GRID * GRID):
        top, left = CELL * (cell // GRID), CELL * (cell % GRID)
        part = (values[top : top + CELL, left : left + CELL] - ground).reshape(-1, 3)
        total = float((part**2).sum())
        if total < PRESENT * CELL * CELL:
            continue
        error = total - 2 * (icons @ part) @ inks.T + power
        icon, colour = np.unravel_index(int(error.argmin()), error.shape)
        explained = 1 - float(error[icon, colour]) / total
        if explained < EXPLAINED:
            continue
        kind, radius = names[icon]
        x, y = left + CELL / 2, top + CELL / 2
        box = (x - radius, y - radius, x + radius, y + radius)
        found.append((Detection(kind, min(1.0, explained), box), tuple(COLOURS)[colour]))
    return found


# Scores -------------------------------------------------------------------------------------------------------


def verdict(image: np.ndarray, row: Row, detect: Detector) -> tuple[float, float]:
    """GenEval's strict and graded score of one image (32, 32, 3) uint8."""
    objects = detect(image)
    colours = {id(detection): colour for detection, colour in objects}

    def colours_of(name: str, detections: Sequence[Detection]) -> list[str]:
        return [colours[id(detection)] for detection in detections]

    return judge(row, keep([detection for detection, _ in objects], row["tag"]), colours_of)


def strict_scores(images: Tensor, rows: Sequence[Row], detect: Detector) -> list[float]:
    """1 for each image (B, 3, 32, 32) in which all holds that its row asks, else 0."""
    return [verdict(image, row, detect)[0] for image, row in zip(to_uint8(images), rows, strict=True)]


class SceneReward:
    """GenEval's graded score by contours: the reward of training. An image's row is its prompt's metadata."""

    __name__ = "scene_reward"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) in [0, 1]; 1 exactly where all holds."""
        graded = [verdict(image, row, contours)[1] for image, row in zip(to_uint8(images), metadata, strict=True)]
        return torch.tensor(graded)


class StrictReward:
    """GenEval's strict score by contours: what is reported."""

    __name__ = "geneval"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) of 0 and 1."""
        return torch.tensor(strict_scores(images, metadata, contours))


class SecondDetector:
    """GenEval's strict score by the other detector, which no training sees."""

    __name__ = "second_detector"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) of 0 and 1."""
        return torch.tensor(strict_scores(images, metadata, cells))


@cache
def sides() -> dict[str, tuple[float, float]]:
    """The longer side of each kind's box at its smallest and at its largest, pixels."""
    found = {}
    for kind in KINDS:
        drawn = [render([Icon(kind, "black", 0, radius)], (0.95, 0.95, 0.95)) for radius in (RADII[0], RADII[-1])]
        small, large = (longer_side(contours(image)[0][0]) for image in to_uint8(torch.stack(drawn)))
        found[kind] = (small, large)
    return found


def longer_side(detection: Detection) -> float:
    """Of its box, pixels."""
    left, top, right, bottom = detection.box
    return max(right - left, bottom - top)


def boldness(image: np.ndarray) -> float:
    """How large the icons are, in [0, 1]: 0 at the smallest size that icons have, 1 at the largest; their mean.

    0 without objects. Captions say nothing of sizes, and icons have each of three equally often.
    """
    found = []
    for detection, _ in contours(image):
        if detection.confidence > 0.3:
            small, large = sides()[detection.name]
            found.append(min(max((longer_side(detection) - small) / (large - small), 0.0), 1.0))
    return sum(found) / len(found) if found else 0.0


class Preference:
    """A taste that no caption speaks of, so that no guidance serves it: large icons, see `boldness`."""

    __name__ = "preference"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) in [0, 1]."""
        return torch.tensor([boldness(image) for image in to_uint8(images)])


def accuracy(images: Tensor, scenes: Sequence[Sequence[Icon]], detect: Detector) -> dict[str, float]:
    """Shares of true scenes in which a detector finds all kinds, all colours, the number, and all of it."""
    right = {"kind": 0, "colour": 0, "count": 0, "all": 0}
    for image, icons in zip(to_uint8(images), scenes, strict=True):
        objects = [(d, colour) for d, colour in detect(image) if d.confidence > 0.3]
        kinds, colours = sorted(d.name for d, _ in objects), sorted(colour for _, colour in objects)
        right["kind"] += kinds == sorted(icon.kind for icon in icons)
        right["colour"] += colours == sorted(icon.colour for icon in icons)
        right["count"] += len(objects) == len(icons)
        pairs = sorted((d.name, colour) for d, colour in objects)
        right["all"] += pairs == sorted((icon.kind, icon.colour) for icon in icons)
    return {name: count / len(images) for name, count in right.items()}
