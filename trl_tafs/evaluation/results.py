"""An evaluation's results: means with intervals, paired differences, correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trl_tafs.evaluation.drawing import DrawSpec
from trl_tafs.evaluation.scores import Task, read_scores, read_thumbnail
from trl_tafs.evaluation.statistics import (
    IMAGE_STATISTICS,
    Estimate,
    bootstrap,
    diversity,
    paired_difference,
    pearson,
    prompt_means,
)


@dataclass(frozen=True)
class ResultRow:
    """One model, drawn in one way."""

    model: str
    sampling: DrawSpec
    images: int
    metrics: dict[str, Estimate]  # rewards by name, GenEval's tasks as geneval/<tag>, statistics of the images
    per_prompt: dict[str, dict[int, float]]  # the means behind them


@dataclass(frozen=True)
class Results:
    """All of an evaluation."""

    rows: list[ResultRow]
    differences: list[dict[str, Any]]  # model, baseline, sampling, metric, estimate: model - baseline, paired
    correlations: list[dict[str, Any]]  # model, sampling, reward, step, r: with the last step's reward
    names: tuple[str, ...]  # of the metrics, in the tables' order
    grids: dict[str, Any]  # label to the models' folders of saved images
    prompts: tuple[str, ...] = ()  # of the evaluation, in order
    titles: Mapping[str, str] = field(default_factory=dict)  # of the rewards that have one, by name

    def title(self, metric: str) -> str:
        """Return a metric's column name: its reward's title, with GenEval's task behind it."""
        name, slash, rest = metric.partition("/")
        return self.titles.get(name, name) + slash + rest


def collect(
    folder: Path, models: Mapping[str, str], samplings: Sequence[DrawSpec], task: Task, resamples: int = 2000
) -> Results:
    """Read what all processes scored, and compare.

    Args:
        folder: of the evaluation.
        models: name to the name of its folder; the first one is what the others are compared with.
        samplings: the ways of drawing.
        task: what was evaluated.
        resamples: of the bootstrap.
    """
    rows, correlations, grids = [], [], {}
    for sampling in samplings:
        paths = {name: folder / "scores" / safe / sampling.label for name, safe in models.items()}
        grids[sampling.label] = {name: path for name, path in paths.items() if path.is_dir()}
        for name, path in grids[sampling.label].items():
            scores = [row for i, row in sorted(read_scores(path).items()) if i < len(task)]
            rows.append(_row(name, sampling, scores, task, resamples))
            correlations += _correlations(name, sampling, scores, task)
    names = _order({metric for row in rows for metric in row.metrics}, task.rewards.names)
    return Results(
        rows,
        _differences(rows, names, resamples),
        correlations,
        names,
        grids,
        tuple(prompt for prompt, _ in task.prompts),
        task.rewards.titles,
    )


def _row(name: str, sampling: DrawSpec, scores: list[dict[str, Any]], task: Task, resamples: int) -> ResultRow:
    numbers = [row["prompt"] for row in scores]
    per_prompt = {}
    for reward in task.rewards.names:
        per_prompt[reward] = prompt_means([row["rewards"][reward] for row in scores], numbers)
    for statistic in IMAGE_STATISTICS:
        per_prompt[statistic] = prompt_means([row["statistics"].get(statistic) for row in scores], numbers)
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
    return ResultRow(name, sampling, len(scores), {k: v for k, v in metrics.items() if v.count}, per_prompt)


def _by_tag(means: Mapping[int, float], task: Task) -> dict[str, dict[int, float]]:
    tasks: dict[str, dict[int, float]] = {}
    for prompt, value in means.items():
        tasks.setdefault(str(task.prompts[prompt][1].get("tag")), {})[prompt] = value
    return dict(sorted(tasks.items()))


def stratified(tasks: Mapping[str, Mapping[int, float]], resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return GenEval's overall score: the mean of its tasks' means, however many prompts each task has.

    The bootstrap resamples prompts within their task.

    Args:
        tasks: task to the means of its prompts.
        resamples: of the bootstrap.
        seed: of its draws.
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


def _order(names: set[str], rewards: Sequence[str]) -> tuple[str, ...]:
    """Sort metrics: rewards as they were given, GenEval's tasks behind it, then the images' statistics."""
    columns = [*rewards, *IMAGE_STATISTICS, "diversity"]
    return tuple(sorted(names, key=lambda name: (columns.index(name.partition("/")[0]), name)))


def _differences(rows: Sequence[ResultRow], names: Sequence[str], resamples: int) -> list[dict[str, Any]]:
    """Compare every model with the first one, drawn in the same way from the same noise."""
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


def _correlations(name: str, sampling: DrawSpec, scores: Sequence[Any], task: Task) -> list[dict[str, Any]]:
    """Return Pearson's r of each step's rewards with the last step's, over the images (Table 7); steps from 1."""
    found = []
    for reward in task.rewards.names if task.step_rewards else ():
        steps = [[row["steps"][reward][n] for row in scores] for n in range(sampling.num_steps)]
        steps = [[float("nan") if value is None else value for value in step] for step in steps]
        for n, step in enumerate(steps[:-1]):
            entry = {"model": name, "sampling": sampling.label, "reward": reward, "step": n + 1}
            found.append(entry | {"of": sampling.num_steps, "r": pearson(step, steps[-1])})
    return found
