"""An evaluation's results as Markdown, CSV, JSON, plots and grids."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trl_tafs.evaluation.results import ResultRow, Results
from trl_tafs.evaluation.statistics import IMAGE_STATISTICS, Estimate
from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.output.markdown import table
from trl_tafs.output.pictures import sample_grid, save_png
from trl_tafs.pipelines.pictures import pictures_of


def shown(estimate: Estimate | None, sign: str = "") -> str:
    """Return an estimate as `mean [low, high]`; "" for none."""
    if estimate is None or estimate.mean != estimate.mean:
        return ""
    interval = "" if estimate.low != estimate.low else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.mean:{sign}.3f}{interval}"


def markdown(results: Results) -> str:
    """Return all tables: means with 95% bootstrap intervals over prompts, paired differences, correlations."""
    header = ["Model", "Sampler", "Steps", "Size", "NFE", "Images", *map(results.title, results.names)]
    body = []
    for row in results.rows:
        s = row.sampling
        cells = [row.model, s.sampler, s.num_steps, f"{s.height} x {s.width}", s.nfe, row.images]
        body.append([*cells, *(shown(row.metrics.get(name)) for name in results.names)])
    parts = ["## Means, with 95% bootstrap intervals over prompts", table(header, body)]
    if results.differences:
        labels = dict.fromkeys((d["model"], d["baseline"], d["sampling"]) for d in results.differences)
        found = {(d["model"], d["baseline"], d["sampling"], d["metric"]): d["estimate"] for d in results.differences}
        body = [[*label, *(shown(found.get((*label, name)), "+") for name in results.names)] for label in labels]
        header = ["Model", "minus", "Sampling", *map(results.title, results.names)]
        parts += ["## Paired differences, on the same prompts and noise", table(header, body)]
    if results.correlations:
        body = [
            [c["model"], c["sampling"], results.title(c["reward"]), f"R^{c['step']} with R^{c['of']}", f"{c['r']:.2f}"]
            for c in results.correlations
        ]
        parts += [
            "## Correlation of a step's reward with the last step's",
            table(["Model", "Sampling", "Reward", "Steps", "r"], body),
        ]
    return "\n\n".join(parts) + "\n"


def as_json(results: Results) -> dict[str, Any]:
    """Return the results as plain values."""
    rows = [
        {"model": row.model, **row.sampling.described(), "images": row.images}
        | {"metrics": {name: asdict(estimate) for name, estimate in row.metrics.items()}}
        for row in results.rows
    ]
    differences = [d | {"estimate": asdict(d["estimate"])} for d in results.differences]
    return {"rows": rows, "differences": differences, "correlations": results.correlations}


def as_csv(results: Results) -> str:
    """Return the means as CSV: a line a model and sampling, three columns a metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{part}" for name in results.names for part in ("", "_low", "_high")]
    writer.writerow(["model", "sampler", "num_steps", "height", "width", "nfe", "images", *columns])
    for row in results.rows:
        s, cells = row.sampling, []
        for name in results.names:
            estimate = row.metrics.get(name)
            cells += ["", "", ""] if estimate is None else [estimate.mean, estimate.low, estimate.high]
        writer.writerow([row.model, s.sampler, s.num_steps, s.height, s.width, s.nfe, row.images, *cells])
    return text.getvalue()


def write(results: Results, folder: Path) -> None:
    """Write `results.md`, `.json`, `.csv`, a grid for each sampling, and `steps.png` if step counts differ."""
    write_whole(folder / "results.md", markdown(results))
    write_whole(folder / "results.json", json.dumps(as_json(results), indent=1))
    write_whole(folder / "results.csv", as_csv(results))
    for label, paths in results.grids.items():
        picture = side_by_side(label, paths, results.prompts)
        if picture is not None:
            save_png(picture, folder / f"grid_{label}.png")
    if len({row.sampling.num_steps for row in results.rows}) > 1:
        plot_steps(results, folder / "steps.png")


def side_by_side(label: str, paths: Mapping[str, Path], prompts: Sequence[str]) -> Any:
    """Return a picture of the saved images: a row a prompt, a column a model; None where there are no images.

    Where prompts have source pictures, the first of each stands in a column before the models.
    """
    import numpy as np
    from PIL import Image

    names = sorted(
        set.intersection(*({path.stem for path in folder.glob("*.png")} for folder in paths.values())), key=int
    )
    if not names:
        return None
    tiles = [[np.array(Image.open(path / f"{name}.png").convert("RGB")) for path in paths.values()] for name in names]
    sources = [pictures_of(prompts[int(name)]) for name in names]
    if all(sources):
        size = tiles[0][0].shape[1::-1]
        tiles = [[np.array(s[0].image().resize(size)), *row] for s, row in zip(sources, tiles, strict=True)]
    images = torch.from_numpy(np.stack([np.stack(row) for row in tiles])).permute(0, 1, 4, 2, 3).float() / 255
    images = images.flatten(0, 1)
    columns = images.shape[0] // len(names)
    if min(images.shape[-2:]) < 96:  # tiny ones: large enough for their labels
        images = torch.nn.functional.interpolate(images, scale_factor=-(-96 // min(images.shape[-2:])))
    models = ["source"] * all(sources) + [name if len(name) <= 16 else "..." + name[-13:] for name in paths]
    return sample_grid(images.unflatten(0, (-1, columns)), [prompts[int(name)] for name in names], models, label)


def plot_steps(results: Results, path: Path) -> None:
    """Plot each reward over the step counts, a line a model and sampler (Figure 4), its interval shaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn('steps.png needs matplotlib: pip install "trl_tafs[plots]"', stacklevel=2)
        return
    names = [name for name in results.names if name not in IMAGE_STATISTICS and "/" not in name]
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    lines: dict[tuple, list[ResultRow]] = {}
    for row in results.rows:
        lines.setdefault((row.model, row.sampling.sampler, row.sampling.height, row.sampling.width), []).append(row)
    sized = len({key[2:] for key in lines}) > 1
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, rows in lines.items():
            rows = sorted((r for r in rows if name in r.metrics), key=lambda r: r.sampling.num_steps)
            steps, found = [r.sampling.num_steps for r in rows], [r.metrics[name] for r in rows]
            label = f"{key[0]}, {key[1]}" + (f", {key[2]} x {key[3]}" if sized else "")
            axes.plot(steps, [e.mean for e in found], marker="o", label=label)
            axes.fill_between(steps, [e.low for e in found], [e.high for e in found], alpha=0.2)
        axes.set(xlabel="sampling steps", title=results.title(name))
    figure.axes[0].legend(fontsize=7)
    with tolerating_disk_faults(path):
        write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
