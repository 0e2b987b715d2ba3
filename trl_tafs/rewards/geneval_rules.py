"""GenEval's rules (Ghosh et al. 2023) on detected objects: torch alone, no model.

A row of the benchmark has a `tag` and requirements: `include`, each with a `class`, a `count` and maybe a `color` and a
`position` (relation, index of an earlier requirement), all of which must hold, and `exclude`, none of which may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.scoring import RewardRefused

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's confidence
MAX_OBJECTS = 16  # of one class, the most confident
POSITION_THRESHOLD = 0.1  # share of both boxes' sizes by which centres must differ
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Detection:
    """One object found in an image."""

    name: str  # its class, by GenEval's name
    confidence: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, pixels
    mask: Tensor | None = None  # (H, W) bool


ColorsOf = Callable[[str, Sequence[Detection]], list[str]]  # a class and its objects to their colours
Found = dict[str, list[Detection]]


def keep(detections: Sequence[Detection], tag: str) -> Found:
    """Return by class the objects that count: those confident enough for the task, the surest first, at most 16."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: Found = {}
    for detection in sorted(detections, key=lambda d: -d.confidence):
        if detection.confidence > threshold:
            found.setdefault(detection.name, []).append(detection)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def relations(first: Detection, second: Detection) -> set[str]:
    """Return where `first` lies relative to `second`: of left of, right of, above, below, those that hold.

    The offset of the centres, less a tenth of both boxes' sizes, must be more than half the distance of the centres.
    """
    boxes = torch.tensor([first.box, second.box], dtype=torch.float64).reshape(2, 2, 2)
    centers, sizes = boxes.mean(1), (boxes[:, 1] - boxes[:, 0]).abs()
    offset = centers[0] - centers[1]
    beyond = (offset.abs() - POSITION_THRESHOLD * sizes.sum(0)).clamp(min=0) * offset.sign()
    if (beyond.abs() < 1e-3).all():
        return set()
    x, y = (beyond / offset.norm()).tolist()
    return {
        name
        for name, holds in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
        if holds
    }


@dataclass(frozen=True)
class Check:
    """How far one requirement is met."""

    count: float  # of the objects asked for, found; [0, 1]
    color: float | None  # of those, of the right colour; None: not asked for
    position: float | None  # of the pairs with the target's objects, rightly placed; None: not asked for
    objects: list[Detection] | None  # those that met all of it, for later requirements to refer to


def check(requirement: Mapping[str, Any], found: Found, earlier: Sequence[Check], colors_of: ColorsOf) -> Check:
    """Return how far one of `include` is met; colour and position are asked of the most confident `count`."""
    name, count = requirement["class"], requirement["count"]
    objects = found.get(name, [])[:count]
    complete = len(objects) >= count
    color = position = None
    if requirement.get("color") is not None:
        right = colors_of(name, objects).count(requirement["color"]) if objects else 0
        color = min(right / count, 1.0)
        complete = complete and right >= count
    if requirement.get("position") is not None:
        relation, target = requirement["position"]
        others = earlier[target].objects or []
        pairs = [relation in relations(a, b) for a in objects for b in others]
        position = sum(pairs) / len(pairs) if pairs else 0.0
        complete = complete and position == 1.0
    return Check(min(len(objects) / count, 1.0), color, position, objects if complete else None)


def judge(row: Mapping[str, Any], found: Found, colors_of: ColorsOf) -> tuple[float, float]:
    """Return (strict, graded) of one image, both in [0, 1]; the graded score is 1 exactly where the strict one is.

    Strict is the benchmark's: 1 if every `include` holds and no `exclude` does. Graded, for training, is the mean over
    the requirements of the mean of their parts (number found, colours, positions); each excess of `exclude` is a
    further requirement, met by the expected over the found number.
    """
    checks: list[Check] = []
    for requirement in row.get("include") or []:
        checks.append(check(requirement, found, checks, colors_of))
    grades = []
    for item in checks:
        parts = [part for part in (item.count, item.color, item.position) if part is not None]
        grades.append(sum(parts) / len(parts))
    excess = False
    for requirement in row.get("exclude") or []:
        number = len(found.get(requirement["class"], []))
        over = number >= requirement["count"]
        excess = excess or over
        if over:
            grades.append((requirement["count"] - 1) / number)
    strict = not excess and all(item.objects is not None for item in checks)
    return float(strict), sum(grades) / len(grades) if grades else 1.0


class FaultyRow(RewardRefused, ValueError):
    """A row that can't be judged."""


def check_row(row: Mapping[str, Any]) -> None:
    """Raise FaultyRow if a row has GenEval's columns and can't be judged; the error says why."""
    names = set(COCO_NAMES)
    for requirement in [*(row.get("include") or []), *(row.get("exclude") or [])]:
        if requirement.get("class") not in names:
            raise FaultyRow(f"GenEval row {row!r}: no class {requirement.get('class')!r}; use COCO's 80, as GenEval's")
        if not isinstance(requirement.get("count"), int) or requirement["count"] < 1:
            raise FaultyRow(f"GenEval row {row!r}: a count must be at least 1, got {requirement.get('count')!r}")
        if (requirement.get("color") or "red") not in COLORS:
            raise FaultyRow(f"GenEval row {row!r}: no colour {requirement['color']!r}; use one of {', '.join(COLORS)}")
    for i, requirement in enumerate(row.get("include") or []):
        if requirement.get("position") is not None and not 0 <= requirement["position"][1] < i:
            raise FaultyRow(f"GenEval row {row!r}: a position refers to an earlier requirement, not to itself")


COCO_NAMES = (  # COCO's 80 classes in their order, three by GenEval's clearer names
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
