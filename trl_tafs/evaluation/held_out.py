"""Evaluation during training, on held-out prompts with held-out rewards."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_tafs.evaluation.drawing import Drawer, DrawSpec, draw_and_score
from trl_tafs.evaluation.statistics import IMAGE_STATISTICS, image_statistics
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.processes import any_process, gather_rows, raise_everywhere
from trl_tafs.prompts.source import PromptSource
from trl_tafs.rewards.scoring import RewardError, RewardSet


def metric_name(sampler: str, num_steps: int, reward: str) -> str:
    """Return what an evaluation calls a reward's mean."""
    return f"eval/{sampler}_{num_steps}/{reward}"


def metric_names(config: Any, rewards: RewardSet) -> Iterator[str]:
    """Yield the metrics that every evaluation of a run will have."""
    for sampler in config.eval_samplers:
        for steps in config.eval_num_steps:
            yield from (metric_name(sampler, steps, reward) for reward in rewards.names)


def statistic_name(sampler: str, num_steps: int, statistic: str) -> str:
    """Return what an evaluation calls the mean of a statistic of its images."""
    return f"image/{sampler}_{num_steps}/{statistic}"


def check_nothing_evaluates(config: Any, held_out: Any | None) -> None:
    """Raise ValueError if something about evaluations is asked for, where no eval_prompts were given."""
    if config.eval_freq:
        raise ValueError(f"eval_freq is {config.eval_freq}, and there are no eval_prompts to evaluate on")
    if held_out is not None:
        raise ValueError("eval_reward_function was given, and there are no eval_prompts to evaluate on; give both")
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if field.name.startswith("eval_") and getattr(config, field.name) != default:
            raise ValueError(f"{field.name}={getattr(config, field.name)} has no effect without eval_prompts")


class Evaluator:
    """Held-out prompts and rewards, drawn and scored by all processes together.

    Args:
        prompts: a sequence or dataset of prompts.
        rewards: that score the images.
        images_per_prompt: images of each prompt.

    Raises:
        ValueError: there are no prompts, or a row has none; all rows are checked, as those of training are.
    """

    def __init__(self, prompts: Any, rewards: RewardSet, images_per_prompt: int = 1) -> None:
        if callable(prompts):
            raise ValueError("eval_prompts is a function; held-out prompts are a fixed set, give a list or a dataset")
        try:
            self.prompts = PromptSource(prompts)
        except ValueError as error:
            raise ValueError(f"eval_prompts: {error}") from error
        self.items = [pair for pair in self.prompts.all() for _ in range(images_per_prompt)]
        self.rewards = rewards

    @classmethod
    def of(cls, config: Any, prompts: Any | None, training: RewardSet, held_out: Any | None = None) -> Evaluator | None:
        """Make the evaluator that a training configuration asks for; None without prompts.

        Args:
            config: what and how often is evaluated.
            prompts: held out.
            training: the rewards that are trained on, for want of others.
            held_out: other rewards, as `RewardSet` takes them.

        Raises:
            ValueError: evaluations are asked for, and there are no prompts; or one of a metric that no evaluation will
                have.
        """
        if prompts is None:
            check_nothing_evaluates(config, held_out)
            return None
        rewards = training if held_out is None else RewardSet.of(config, held_out)
        made = cls(prompts, rewards, config.eval_images_per_prompt)
        names = list(metric_names(config, rewards))
        if len(set(names)) < len(names):
            raise ValueError(
                f"eval_num_steps={config.eval_num_steps} and eval_samplers={config.eval_samplers} name an evaluation "
                "twice; name each once"
            )
        metric = config.metric_for_best_model
        if metric is not None and metric not in names:
            near = difflib.get_close_matches(metric, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? There are " if near else "use one of "
            raise ValueError(f"metric_for_best_model is {metric!r}, which no evaluation has; {hint}{', '.join(names)}")
        return made

    def __call__(
        self, drawer: Drawer, specs: Sequence[DrawSpec], accelerator: Any, *, ranges: bool = False
    ) -> dict[str, float]:
        """Return `eval/<sampler>_<steps>/<reward>` of each way of drawing: the mean over all images with a score.

        Beside them stand `image/<sampler>_<steps>/<statistic>`, the mean of each statistic of the images themselves;
        with `ranges` also its `/low` and `/high`, the least and the most of any image.

        Raises:
            RewardError: a reward failed on any process; raised on all of them.
            NonFiniteError: the denoiser or the VAE made NaN or infinity on any process; raised on all of them.
        """
        world, rank = accelerator.num_processes, accelerator.process_index
        share = -(-len(self.items) // world)
        mine = [i % len(self.items) for i in range(rank * share, (rank + 1) * share)]  # padded: equal work everywhere
        items, results = [self.items[i] for i in mine], {}
        fault: Exception | None = None
        for spec in specs:
            try:
                images, values = draw_and_score(drawer, spec, self.rewards, items, mine)
                values = torch.cat([values[:, 0], image_statistics(images[:, 0])], dim=1)
            except (RewardError, NonFiniteError) as error:  # the others wait in the gather: fail together, below
                fault = fault or error
                count = len(self.rewards.names) + len(IMAGE_STATISTICS)
                values = torch.full((len(mine), count), torch.nan, dtype=torch.float64)
            everyone = gather_rows(accelerator, values)[: len(self.items)]
            scores, measured = everyone.split([len(self.rewards.names), len(IMAGE_STATISTICS)], dim=1)
            for name, mean in zip(self.rewards.names, scores.nanmean(dim=0).tolist(), strict=True):
                results[metric_name(spec.sampler, spec.num_steps, name)] = mean
            results |= _described(spec, measured, ranges)
        if any_process(accelerator, fault is not None):
            raise_everywhere(accelerator, fault, NonFiniteError, "evaluation")
            raise_everywhere(accelerator, fault, RewardError, "evaluation")
        return results


def held_out_metrics(config: Any, held_out: Evaluator | None) -> tuple[str, ...]:
    """Return the metrics that every evaluation of a run will have; none where it has no evaluations."""
    return () if held_out is None else tuple(metric_names(config, held_out.rewards))


def prompts_to_show(training: PromptSource, held_out: Evaluator | None) -> list[str]:
    """Return prompts for cards and pictures: held-out ones, or those of the first epoch."""
    pairs = training.groups(0, 16) if held_out is None else held_out.items
    return [prompt for prompt, _ in pairs]


def _described(spec: DrawSpec, measured: Tensor, ranges: bool) -> dict[str, float]:
    """Return the mean of each statistic of a way of drawing, by name, with its range; measured are (B, 4)."""
    found = {}
    for statistic, column in zip(IMAGE_STATISTICS, measured.unbind(1), strict=True):
        name = statistic_name(spec.sampler, spec.num_steps, statistic)
        found[name] = column.nanmean().item()
        if ranges:
            known = column[~column.isnan()]
            found |= {f"{name}/low": known.min().item(), f"{name}/high": known.max().item()} if len(known) else {}
    return found
