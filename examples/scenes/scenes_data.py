"""Scenes of one to four icons, their captions in GenEval's six kinds, and what is held out.

An image is (3, 32, 32) in [0, 1]: icons of eight kinds, eight colours and three sizes, each in a cell of its own of a
2 x 2 grid, on a plain light ground. Nothing is stored: icons are drawn by Pillow at eight times their size, once a
process.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIDE, CELL, GRID, PATCH = 32, 16, 2, 8  # pixels of an image, of a cell; cells a side; pixels of the transformer's patch
KINDS = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
PLURALS = {kind: kind + ("es" if kind == "cross" else "s") for kind in KINDS}
COLOURS = {
    "red": (0.86, 0.08, 0.10),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.93, 0.83, 0.05),
    "green": (0.05, 0.58, 0.18),
    "blue": (0.10, 0.25, 0.88),
    "purple": (0.52, 0.12, 0.68),
    "pink": (0.97, 0.50, 0.75),
    "black": (0.06, 0.06, 0.06),
}
RADII = (4.6, 5.8, 7.0)  # of an icon, pixels
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# shares of the captions: that tell only a part, that are another scene's, that are empty
VAGUE, WRONG, EMPTY = 0.1, 0.04, 0.1

Row = dict[str, Any]  # as GenEval's: tag, include, exclude


@dataclass(frozen=True)
class Icon:
    """One object of a scene."""

    kind: str
    colour: str
    cell: int  # 0 to 3, row by row
    radius: float = RADII[1]


def outline(kind: str, middle: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a kind that is a polygon."""
    if kind == "square":
        side = 0.84 * radius
        return [(middle + x * side, middle + y * side) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if kind == "cross":
        thin = 0.34 * radius
        quarter = [(-thin, -radius), (thin, -radius), (thin, -thin)]
        turned = [(x, y) for k in range(4) for x, y in [_turned(point, k * math.pi / 2) for point in quarter]]
        return [(middle + x, middle + y) for x, y in turned]
    if kind == "heart":
        points = []
        for k in range(64):
            t = 2 * math.pi * k / 64
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((middle + x * radius / 16, middle - (y + 2.5) * radius / 15))
        return points
    corners, inner = {"triangle": (3, None), "star": (5, 0.42)}[kind]
    drop = 0.2 * radius if kind == "triangle" else 0.06 * radius
    radii = [1.08 * radius] if inner is None else [1.05 * radius, inner * radius]
    count = corners * len(radii)
    turns = [(radii[k % len(radii)], 2 * math.pi * k / count) for k in range(count)]
    return [(middle + r * math.sin(a), middle + drop - r * math.cos(a)) for r, a in turns]


def _turned(point: tuple[float, float], angle: float) -> tuple[float, float]:
    x, y = point
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


@cache
def coverage(kind: str, radius: float) -> np.ndarray:
    """How far an icon covers the pixels of its cell, (16, 16) in [0, 1]."""
    scale, middle = 8, 8 * CELL / 2
    image = Image.new("L", (CELL * scale, CELL * scale))
    draw, size = ImageDraw.Draw(image), radius * scale

    def disc(x: float, y: float, r: float, fill: int) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    if kind in ("circle", "ring", "moon"):
        disc(middle, middle, size, 255)
        if kind == "ring":
            disc(middle, middle, 0.52 * size, 0)
        if kind == "moon":
            disc(middle + 0.55 * size, middle - 0.18 * size, 0.85 * size, 0)
    else:
        draw.polygon(outline(kind, middle, size), fill=255)
    return np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX), dtype=np.float32) / 255


def render(icons: Sequence[Icon], ground: Sequence[float]) -> Tensor:
    """The true image (3, 32, 32) of a scene on a ground of one colour."""
    image = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    image[:] = ground
    for icon in icons:
        top, left = CELL * (icon.cell // GRID), CELL * (icon.cell % GRID)
        alpha = coverage(icon.kind, icon.radius)[:, :, None]
        cell = image[top : top + CELL, left : left + CELL]
        cell[:] = alpha * np.array(COLOURS[icon.colour], dtype=np.float32) + (1 - alpha) * cell
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def random_ground(rng: random.Random) -> tuple[float, ...]:
    """A light tint, each channel in [.9, 1]."""
    return tuple(0.9 + 0.1 * rng.random() for _ in range(3))


# What is held out ---------------------------------------------------------------------------------------------

HELD_COLOURS = {kind: tuple(COLOURS)[(3 * i + 1) % 8] for i, kind in enumerate(KINDS)}
HELD_COUNTS = {kind: 2 + i % 3 for i, kind in enumerate(KINDS)}
HELD_PAIRS = {frozenset((KINDS[i], KINDS[(i + 3) % 8])) for i in range(8)}


def held_out(icons: Sequence[Icon]) -> bool:
    """Whether a scene has a kind in a colour, a number of a kind or a pair of kinds that no training may see."""
    kinds = [icon.kind for icon in icons]
    if any(HELD_COLOURS[icon.kind] == icon.colour for icon in icons) or frozenset(kinds) in HELD_PAIRS:
        return True
    return len(icons) > 1 and any(kinds.count(kind) == HELD_COUNTS[kind] for kind in set(kinds))


# Captions and what they ask -----------------------------------------------------------------------------------


def named(kind: str, colour: str | None = None) -> str:
    """A star; a red star."""
    words = kind if colour is None else f"{colour} {kind}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def asked(tag: str, *include: Row) -> Row:
    """A row of GenEval's form, in which nothing may be there but what is asked.

    GenEval excludes one more than asked in counting alone; here more of an asked kind and all other kinds, always.
    """
    most = {item["class"]: item["count"] for item in include}
    return {
        "tag": tag,
        "include": list(include),
        "exclude": [{"class": kind, "count": most.get(kind, 0) + 1} for kind in KINDS],
    }


def need(kind: str, count: int = 1, **more: Any) -> Row:
    """One requirement."""
    return {"class": kind, "count": count} | more


def single(kind: str) -> tuple[str, Row]:
    """A star."""
    return named(kind), asked("single_object", need(kind))


def coloured(kind: str, colour: str) -> tuple[str, Row]:
    """A red star."""
    return named(kind, colour), asked("colors", need(kind, color=colour))


def counted(kind: str, count: int) -> tuple[str, Row]:
    """Three stars."""
    return f"{COUNTS[count]} {PLURALS[kind]}", asked("counting", need(kind, count))


def two(first: str, second: str) -> tuple[str, Row]:
    """A star and a circle."""
    return f"{named(first)} and {named(second)}", asked("two_object", need(first), need(second))


def placed(first: str, relation: str, second: str) -> tuple[str, Row]:
    """A star left of a circle."""
    row = asked("position", need(second), need(first, position=[relation, 0]))
    return f"{named(first)} {relation} {named(second)}", row


def two_coloured(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, Row]:
    """A red star and a blue circle; each (kind, colour)."""
    row = asked("color_attr", need(first[0], color=first[1]), need(second[0], color=second[1]))
    return f"{named(*first)} and {named(*second)}", row


def relation_of(first: int, second: int) -> list[str]:
    """Where one cell lies of another: of two relations both are given where the cells lie askew by as much."""
    x, y = first % GRID - second % GRID, first // GRID - second // GRID
    length = math.hypot(x, y)
    return [name for name, (dx, dy) in RELATIONS.items() if (x * dx + y * dy) / length > 0.6]


QUESTIONS = (len(KINDS), len(COLOURS) + 1, 4, len(KINDS) + 1, len(COLOURS) + 1, len(RELATIONS) + 1)  # answers of each


def answers(row: Row) -> list[int]:
    """What a caption says, one number for each of QUESTIONS: kind, colour, number, other kind, its colour, where it is.

    The last of each is that nothing is said, but for the first kind and the number.
    """
    first, *others = row["include"]
    other = others[0] if others else {}
    kinds, colours, relations = list(KINDS), list(COLOURS), list(RELATIONS)
    return [
        kinds.index(first["class"]),
        colours.index(first["color"]) if "color" in first else len(colours),
        first["count"] - 1,
        kinds.index(other["class"]) if other else len(kinds),
        colours.index(other["color"]) if "color" in other else len(colours),
        relations.index(other["position"][0]) if "position" in other else len(relations),
    ]


def draw_scene(tag: str, rng: random.Random) -> tuple[list[Icon], str, Row]:
    """A random scene of a kind that isn't held out, with its whole caption and what that asks."""
    while True:
        kinds, colours = rng.sample(KINDS, 2), [rng.choice(tuple(COLOURS)) for _ in range(2)]
        count = rng.choice(tuple(COUNTS)) if tag == "counting" else 1 if tag in ("single_object", "colors") else 2
        cells = rng.sample(range(GRID * GRID), count)
        same = tag == "counting"
        icons = [
            Icon(kinds[0 if same else k], colours[0 if same else k], cell, rng.choice(RADII))
            for k, cell in enumerate(cells)
        ]
        if held_out(icons):
            continue
        if tag == "single_object":
            said = single(kinds[0])
        elif tag == "colors":
            said = coloured(kinds[0], colours[0])
        elif tag == "counting":
            said = counted(kinds[0], count)
        elif tag == "two_object":
            said = two(*kinds)
        elif tag == "position":
            relations = relation_of(cells[0], cells[1])
            if not relations:
                continue
            said = placed(kinds[0], rng.choice(relations), kinds[1])
        else:
            said = two_coloured(*zip(kinds, colours, strict=True))
        return icons, *said


def vague(icons: Sequence[Icon]) -> str:
    """A caption that tells a part: one of two objects, or that there are several."""
    first = icons[0]
    if len(icons) > 1 and all(icon.kind == first.kind for icon in icons):
        return PLURALS[first.kind]
    return named(first.kind)


def training_batch(count: int, rng: random.Random, flaws: bool = True) -> tuple[Tensor, list[str]]:
    """Images (B, 3, 32, 32) with captions; with `flaws` some tell a part, some are another scene's; some are empty."""
    images, captions = [], []
    for _ in range(count):
        icons, caption, _ = draw_scene(rng.choice(TAGS), rng)
        images.append(render(icons, random_ground(rng)))
        flaw = rng.random() if flaws else 1.0
        if flaw < WRONG:
            caption = draw_scene(rng.choice(TAGS), rng)[1]
        elif flaw < WRONG + VAGUE:
            caption = vague(icons)
        captions.append("" if rng.random() < EMPTY else caption)
    return torch.stack(images), captions


def true_scenes(prompts: Sequence[tuple[str, Row]], seed: int) -> tuple[Tensor, list[list[Icon]]]:
    """A true image of each prompt, (B, 3, 32, 32), with its icons: what a perfect model would draw."""
    rng, images, scenes = random.Random(seed), [], []
    for _, row in prompts:
        icons = realised(row, rng)
        images.append(render(icons, random_ground(rng)))
        scenes.append(icons)
    return torch.stack(images), scenes


def realised(row: Row, rng: random.Random) -> list[Icon]:
    """Icons that meet what is asked."""
    while True:
        needs = row["include"]
        free = rng.choice(tuple(COLOURS))
        icons: list[Icon] = []
        cells = rng.sample(range(GRID * GRID), sum(item["count"] for item in needs))
        for item in needs:
            colour = item.get("color") or (free if row["tag"] == "counting" else rng.choice(tuple(COLOURS)))
            icons += [
                Icon(item["class"], colour, cells[len(icons) + k], rng.choice(RADII)) for k in range(item["count"])
            ]
        if row["tag"] != "position" or needs[1]["position"][0] in relation_of(cells[1], cells[0]):
            return icons


def held_out_prompts() -> list[tuple[str, Row]]:
    """16 of each tag: combinations that no training saw; a single object has none, and its noise alone is new."""
    prompts = [single(kind) for kind in KINDS] * 2
    pairs = [(KINDS[i], KINDS[(i + 3) % 8]) for i in range(8)]
    prompts += [two(a, b) for a, b in pairs] + [two(b, a) for a, b in pairs]
    prompts += [counted(kind, HELD_COUNTS[kind]) for kind in KINDS] * 2
    prompts += [coloured(kind, HELD_COLOURS[kind]) for kind in KINDS] * 2
    names = list(RELATIONS)
    prompts += [placed(a, names[i % 4], b) for i, (a, b) in enumerate(pairs)]
    prompts += [placed(b, names[(i + 1) % 4], a) for i, (a, b) in enumerate(pairs)]
    both = [((a, HELD_COLOURS[a]), (b, HELD_COLOURS[b])) for a, b in pairs]
    return prompts + [two_coloured(a, b) for a, b in both] + [two_coloured(b, a) for a, b in both]


def training_prompts(each: int = 64, seed: int = 0) -> list[tuple[str, Row]]:
    """Up to `each` different prompts of each tag, none held out."""
    rng, found = random.Random(seed), []
    for tag in TAGS:
        mine: dict[str, Row] = {}
        for _ in range(20 * each):
            if len(mine) < each:
                _, caption, row = draw_scene(tag, rng)
                mine.setdefault(caption, row)
        found += list(mine.items())
    return found
