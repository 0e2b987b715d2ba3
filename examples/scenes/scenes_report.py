"""The page and the picture of the scenes: runs/scenes_*/summary.json to docs/results/scenes.json and README.md here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from scenes_data import SIDE, TAGS
from torch import Tensor

from trl_tafs.output.markdown import table

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results" / "scenes.json"
COLUMNS = ("geneval", "second_detector", "preference", "diversity")
ENLARGED, GAP = 4, 6  # times; pixels between pictures
SHOWN = (4, 20, 36, 52, 68, 84, 11, 30, 44, 58, 76, 90)  # prompts of the held-out ones


def picture(prompts: Sequence[tuple[str, Any]], each: int, before: Tensor, after: Tensor, path: Path) -> None:
    """Captions with one image before and one after training, three times enlarged, on the same noise."""
    texts = [text for text, _ in prompts[::each]]
    chosen = [i for i in SHOWN if i < len(texts)]
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    side = SIDE * ENLARGED
    columns, rows = 4, -(-len(chosen) // 4)
    width, height = 2 * side + 3 * GAP, side + 30
    canvas = Image.new("RGB", (columns * (width + 14), 34 + rows * (height + 8)), "white")
    draw = ImageDraw.Draw(canvas)
    title = "4 steps, no guidance. Of each pair: left the base model, right after training, from the same noise"
    draw.text((GAP, 8), title, fill="black", font=font)
    for k, i in enumerate(chosen):
        left, top = (k % columns) * (width + 14) + GAP, 34 + (k // columns) * (height + 8)
        draw.text((left, top + 4), f"“{texts[i]}”".replace("“", '"').replace("”", '"'), fill="black", font=small)
        for place, images in enumerate((before, after)):
            values = (images[i * each].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(values).resize((side, side), Image.Resampling.NEAREST)
            x, y = left + place * (side + GAP), top + 24
            draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#999999")
            canvas.paste(tile, (x, y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def told(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Evaluations, and each column's mean with the values of the seeds."""
    cells = [str(rows[0]["evaluations"])]
    for name in COLUMNS:
        values = [row[name] for row in rows]
        seeds = f" ({' '.join(f'{value:.3f}'.removeprefix('0') for value in values)})" if len(values) > 1 else ""
        cells.append(f"{mean(values):.3f}{seeds}")
    return cells


def page(results: dict[str, Any]) -> str:
    """The tables."""
    rows = [[name, *told([row])] for name, row in results["base"].items()]
    by_tag = [["base, 4 annealed steps", *tags([results["base"]["base, 4 annealed steps"]])]]
    for reward, runs in results["runs"].items():
        names = [
            name for name in next(iter(runs.values()))["after"] if all(name in run["after"] for run in runs.values())
        ]
        for name in names:
            mine = [run["after"][name] for run in runs.values()]
            rows.append([f"{reward}: {name}", *told(mine)])
            if name == "after, 4 annealed steps":
                by_tag.append([f"{reward}: {name}", *tags(mine)])
    header = ["", "evaluations", "GenEval (seeds)", "second detector", "preference", "diversity over true scenes'"]
    parts = [table(header, rows), table(["GenEval by kind", *TAGS], by_tag)]
    facts = [
        f"{reward}: {run['epochs']} epochs, {run['cpu_seconds']:.0f} s of CPU"
        for reward, runs in results["runs"].items()
        for run in list(runs.values())[:1]
    ]
    return "\n\n".join([*parts, "; ".join(facts) + "."])


def tags(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The mean score of each tag."""
    return [f"{mean(row['tags'][tag] for row in rows):.3f}" for tag in TAGS]


def write_report(folder: Path) -> None:
    """Gather the runs, write docs/results/scenes.json, and the tables between the marks of README.md here."""
    found: dict[str, Any] = {"base": {}, "runs": {}}
    for path in sorted(folder.glob("scenes_*/summary.json")):
        summary = json.loads(path.read_text())
        if summary.pop("chosen") or summary["options"]:
            continue
        base = summary.pop("base")
        found["base"] = max(found["base"], base, key=len)
        found["runs"].setdefault(summary["reward"], {})[str(summary["seed"])] = summary
    if not found["runs"]:
        raise SystemExit(f"there are no summaries of runs in {folder}; train first: python examples/scenes_geneval.py")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    target = HERE / "README.md"
    before, _, rest = target.read_text().partition("<!-- tables: begin -->")
    after = rest.partition("<!-- tables: end -->")[2]
    target.write_text(f"{before}<!-- tables: begin -->\n\n{page(found)}\n\n<!-- tables: end -->{after}")


__all__ = ["page", "picture", "write_report"]
