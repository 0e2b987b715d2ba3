"""An evaluation's scores as tables, plots and grids, and on the adapter's card."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trl_tafs.metrics import sample_grid, save_png
from trl_tafs.scores import Sampling, Task, describe, read_scores, read_thumbnail
from trl_tafs.statistics import (
    IMAGE_STATISTICS,
    Estimate,
    bootstrap,
    diversity,
    paired_difference,
    pearson,
    prompt_means,
)

PAPER = {  # the columns of the paper's tables, in its order
    "geneval": "GenEval",
    "pickscore": "PickScore",
    "clip_score": "CLIP",
    "hps_v2": "HPSv2.1",
    "image_reward": "ImageReward",
    "unified_reward": "UnifiedReward",
}


@dataclass(frozen=True)
class Row:
    """A model drawn in one way."""

    model: str
    sampling: Sampling
    images: int
    metrics: dict[str, Estimate]  # rewards by name, GenEval's tasks as geneval/<tag>, statistics of the images
    per_prompt: dict[str, dict[int, float]]  # the means behind them


@dataclass(frozen=True)
class Results:
    """All of an evaluation."""

    rows: list[Row]
    differences: list[dict[str, Any]]  # model, baseline, sampling, metric, estimate: model - baseline, paired
    correlations: list[dict[str, Any]]  # model, sampling, reward, step, r: with the last step's reward
    names: tuple[str, ...]  # of the metrics, in the tables' order
    grids: dict[str, Any]  # label to the models' folders of saved images
    prompts: tuple[str, ...] = ()  # of the evaluation, in order


def collect(
    folder: Path, models: Mapping[str, str], samplings: Sequence[Sampling], task: Task, resamples: int = 2000
) -> Results:
    """Read what all processes scored; `models` are names and their folders' names."""
    rows, correlations, grids = [], [], {}
    for sampling in samplings:
        paths = {name: folder / "scores" / safe / sampling.label for name, safe in models.items()}
        grids[sampling.label] = {name: path for name, path in paths.items() if path.is_dir()}
        for name, path in grids[sampling.label].items():
            scores = [row for i, row in sorted(read_scores(path).items()) if i < len(task)]
            rows.append(_row(name, sampling, scores, task, resamples))
            correlations += _correlations(name, sampling, scores, task)
    names = _order({metric for row in rows for metric in row.metrics})
    return Results(
        rows,
        _differences(rows, names, resamples),
        correlations,
        names,
        grids,
        tuple(prompt for prompt, _ in task.prompts),
    )


def _row(name: str, sampling: Sampling, scores: list[dict[str, Any]], task: Task, resamples: int) -> Row:
    numbers = [row["prompt"] for row in scores]
    per_prompt = {}
    for reward in task.rewards.names:
        per_prompt[reward] = prompt_means([row["rewards"][reward] for row in scores], numbers)
    for statistic in IMAGE_STATISTICS:
        per_prompt[statistic] = prompt_means([row["statistics"][statistic] for row in scores], numbers)
    if task.images_per_prompt > 1:
        groups: dict[int, list[torch.Tensor]] = {}
        for row in scores:
            groups.setdefault(row["prompt"], []).append(read_thumbnail(row["thumbnail"]))
        values = {prompt: diversity(torch.stack(small)) for prompt, small in groups.items()}
        per_prompt["diversity"] = {prompt: value for prompt, value in values.items() if value == value}
    metrics = {}
    for metric, means in list(per_prompt.items()):
        metrics[metric] = bootstrap(list(means.values()), resamples=resamples)
        if metric.rpartition("/")[2] == "geneval":
            tasks = _by_tag(means, task)
            metrics[metric] = stratified(tasks, resamples)
            for tag, part in tasks.items():
                per_prompt[f"{metric}/{tag}"] = part
                metrics[f"{metric}/{tag}"] = bootstrap(list(part.values()), resamples=resamples)
    return Row(name, sampling, len(scores), {k: v for k, v in metrics.items() if v.count}, per_prompt)


def _by_tag(means: Mapping[int, float], task: Task) -> dict[str, dict[int, float]]:
    tasks: dict[str, dict[int, float]] = {}
    for prompt, value in means.items():
        tasks.setdefault(str(task.prompts[prompt][1].get("tag")), {})[prompt] = value
    return dict(sorted(tasks.items()))


def stratified(tasks: Mapping[str, Mapping[int, float]], resamples: int = 2000, seed: int = 0) -> Estimate:
    """GenEval's overall score: the mean of its tasks' means, however many prompts each has; prompts are resampled
    within their task.
    """
    import numpy as np

    groups = [np.asarray(list(part.values())) for part in tasks.values() if part]
    if not groups:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    generator = np.random.default_rng(seed)
    draws = [group[generator.integers(0, len(group), (resamples, len(group)))].mean(1) for group in groups]
    low, high = np.quantile(np.stack(draws).mean(0), [0.025, 0.975])
    mean = float(np.mean([group.mean() for group in groups]))
    return Estimate(mean, float(low), float(high), sum(map(len, groups)))


def _order(names: set[str]) -> tuple[str, ...]:
    """The paper's columns first, GenEval's tasks behind it, then other rewards, then the images' statistics."""
    last = (*IMAGE_STATISTICS, "diversity")

    def place(name: str) -> tuple[int, int, str]:
        base = name.partition("/")[0]
        if base in PAPER:
            return 0, list(PAPER).index(base), name
        return (2, last.index(name), "") if name in last else (1, 0, name)

    return tuple(sorted(names, key=place))


def _differences(rows: Sequence[Row], names: Sequence[str], resamples: int) -> list[dict[str, Any]]:
    """Every model against the first one, drawn in the same way from the same noise."""
    found = []
    baselines = {row.sampling.label: row for row in reversed(rows) if row.model == rows[0].model}
    for row in rows:
        base = baselines.get(row.sampling.label)
        if base is None or row is base:
            continue
        for metric in names:
            if metric in row.per_prompt and metric in base.per_prompt:
                estimate = paired_difference(base.per_prompt[metric], row.per_prompt[metric], resamples=resamples)
                entry = {"model": row.model, "baseline": base.model, "sampling": row.sampling.label}
                found.append(entry | {"metric": metric, "estimate": estimate})
    return found


def _correlations(name: str, sampling: Sampling, scores: Sequence[Any], task: Task) -> list[dict[str, Any]]:
    """Pearson's r of each step's rewards with the last step's, over the images (Table 7); steps from 1."""
    found = []
    for reward in task.rewards.names if task.step_rewards else ():
        steps = [[row["steps"][reward][n] for row in scores] for n in range(sampling.num_steps)]
        steps = [[float("nan") if value is None else value for value in step] for step in steps]
        for n, step in enumerate(steps[:-1]):
            entry = {"model": name, "sampling": sampling.label, "reward": reward, "step": n + 1}
            found.append(entry | {"of": sampling.num_steps, "r": pearson(step, steps[-1])})
    return found


# Writing --------------------------------------------------------------------------------------------------------


def title(metric: str) -> str:
    """A column's name, as the paper has it where it does."""
    base, slash, rest = metric.partition("/")
    return PAPER.get(base, base) + slash + rest


def shown(estimate: Estimate | None, sign: str = "") -> str:
    """`mean [low, high]`."""
    if estimate is None or estimate.mean != estimate.mean:
        return ""
    interval = "" if estimate.low != estimate.low else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.mean:{sign}.3f}{interval}"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def markdown(results: Results) -> str:
    """All tables: means with 95% bootstrap intervals over prompts, paired differences, correlations."""
    header = ["Model", "Sampler", "Steps", "Size", "NFE", "Images", *map(title, results.names)]
    body = []
    for row in results.rows:
        s = row.sampling
        cells = [row.model, s.sampler, s.num_steps, f"{s.height} x {s.width}", s.nfe, row.images]
        body.append([*cells, *(shown(row.metrics.get(name)) for name in results.names)])
    parts = ["## Means, with 95% bootstrap intervals over prompts", _markdown_table(header, body)]
    if results.differences:
        labels = dict.fromkeys((d["model"], d["baseline"], d["sampling"]) for d in results.differences)
        found = {(d["model"], d["baseline"], d["sampling"], d["metric"]): d["estimate"] for d in results.differences}
        body = [[*label, *(shown(found.get((*label, name)), "+") for name in results.names)] for label in labels]
        header = ["Model", "minus", "Sampling", *map(title, results.names)]
        parts += ["## Paired differences, on the same prompts and noise", _markdown_table(header, body)]
    if results.correlations:
        body = [
            [c["model"], c["sampling"], title(c["reward"]), f"R^{c['step']} with R^{c['of']}", f"{c['r']:.2f}"]
            for c in results.correlations
        ]
        parts += [
            "## Correlation of a step's reward with the last step's",
            _markdown_table(["Model", "Sampling", "Reward", "Steps", "r"], body),
        ]
    return "\n\n".join(parts) + "\n"


def as_json(results: Results) -> dict[str, Any]:
    """Plain values."""
    rows = [
        {"model": row.model, **describe(row.sampling), "images": row.images}
        | {"metrics": {name: asdict(estimate) for name, estimate in row.metrics.items()}}
        for row in results.rows
    ]
    differences = [d | {"estimate": asdict(d["estimate"])} for d in results.differences]
    return {"rows": rows, "differences": differences, "correlations": results.correlations}


def as_csv(results: Results) -> str:
    """A line a model and sampling, three columns a metric."""
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
    """`results.md`, `.json`, `.csv`, a grid for each sampling, and `steps.png` where there are several step counts."""
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(as_json(results), indent=1), encoding="utf-8")
    (folder / "results.csv").write_text(as_csv(results), encoding="utf-8")
    for label, paths in results.grids.items():
        picture = side_by_side(label, paths, results.prompts)
        if picture is not None:
            save_png(picture, folder / f"grid_{label}.png")
    if len({row.sampling.num_steps for row in results.rows}) > 1:
        plot_steps(results, folder / "steps.png")


def side_by_side(label: str, paths: Mapping[str, Path], prompts: Sequence[str]) -> Any:
    """The saved images of the first prompts, a column a model, from the same noise."""
    import numpy as np
    from PIL import Image

    names = sorted(
        set.intersection(*({path.stem for path in folder.glob("*.png")} for folder in paths.values())), key=int
    )
    if not names:
        return None
    tiles = [[np.array(Image.open(path / f"{name}.png").convert("RGB")) for path in paths.values()] for name in names]
    images = torch.from_numpy(np.stack([np.stack(row) for row in tiles])).permute(0, 1, 4, 2, 3).float() / 255
    images = images.flatten(0, 1)
    columns = images.shape[0] // len(names)
    if min(images.shape[-2:]) < 96:  # tiny ones: large enough for their labels
        images = torch.nn.functional.interpolate(images, scale_factor=-(-96 // min(images.shape[-2:])))
    models = [name if len(name) <= 16 else "..." + name[-13:] for name in paths]
    return sample_grid(images.unflatten(0, (-1, columns)), [prompts[int(name)] for name in names], models, label)


def plot_steps(results: Results, path: Path) -> None:
    """Each reward over the step counts, a line a model and sampler (Figure 4), its interval shaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("steps.png needs matplotlib: pip install matplotlib", stacklevel=2)
        return
    names = [name for name in results.names if name not in IMAGE_STATISTICS and "/" not in name]
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    lines: dict[tuple, list[Row]] = {}
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
        axes.set(xlabel="sampling steps", title=title(name))
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def card_results(results: Results, model: str, dataset: str) -> list[Any]:
    """A model's means as the Hub's `EvalResult`s, one a metric and sampling."""
    from huggingface_hub import EvalResult

    found = []
    for row in results.rows:
        s = row.sampling
        for name, estimate in row.metrics.items():
            if row.model != model or name in IMAGE_STATISTICS or name == "diversity":
                continue
            how = f"{s.sampler}, {s.num_steps} steps, {s.height} x {s.width}, {s.nfe} NFE"
            if s.embedded_guidance_scale is not None:
                how += f", embedded guidance {s.embedded_guidance_scale:g}"
            found.append(
                EvalResult(
                    task_type="text-to-image",
                    dataset_type=dataset.replace(" ", "_"),
                    dataset_name=dataset,
                    metric_type=name,
                    metric_name=f"{title(name)} ({how})",
                    metric_value=round(estimate.mean, 6),
                    dataset_config=s.label,
                )
            )
    return found


def push(results: Results, model: str, repo_id: str, dataset: str, token: str | None = None) -> str:
    """Add a model's results to the card of its repository, those of the same metric and sampling replaced; its URL."""
    from huggingface_hub import ModelCard, metadata_update
    from huggingface_hub.repocard_data import eval_results_to_model_index

    name = ModelCard.load(repo_id, token=token).data.to_dict().get("model_name") or repo_id.rpartition("/")[2]
    index = eval_results_to_model_index(name, card_results(results, model, dataset))
    return metadata_update(
        repo_id, {"model-index": index}, overwrite=True, token=token, commit_message="Add evaluation results"
    )
