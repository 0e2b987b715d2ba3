"""`trl_tafs.evaluate()`: models on a prompt set, the same noise for each; resumable, on any number of processes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trl_tafs.evaluation.drawing import SAMPLERS, Drawer, DrawSpec, draw_and_score
from trl_tafs.evaluation.results import Results, collect
from trl_tafs.evaluation.scores import Task, read_scores, score_lines
from trl_tafs.evaluation.tables import write
from trl_tafs.output.files import write_whole
from trl_tafs.output.pictures import save_png, tensor_to_image
from trl_tafs.output.secrets import without_secrets
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import is_text_encoder
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.pipelines.identity import base_identity
from trl_tafs.pipelines.pictures import check_source_pictures
from trl_tafs.pipelines.quantized import is_bitsandbytes
from trl_tafs.policy.carried import active_adapters, frozen_adapter
from trl_tafs.policy.denoiser_file import applied
from trl_tafs.policy.fingerprint import fingerprint
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.prompts.source import row_to_prompt
from trl_tafs.rewards.scoring import RewardError, RewardSet

ENCODED_AT_ONCE = 64  # prompts for which text encoders that are offloaded come to the GPU


def evaluate(
    models: Mapping[str, Any],
    prompts: Any,
    rewards: Any,
    output_dir: str | Path,
    *,
    num_steps: Sequence[int] = (4,),
    samplers: Sequence[str] = ("annealed",),
    sizes: Sequence[tuple[int, int]] | None = None,
    guidance_scale: float = 1.0,
    embedded_guidance_scale: float | None = None,
    negative_prompt: str | None = "",
    images_per_prompt: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    step_rewards: bool = False,
    grid_prompts: int = 8,
    max_sequence_length: int | None = None,
    offload_text_encoders: bool = False,
    reward_options: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    levels: str = "uniform",
) -> Results:
    """Draw images by each model, score them and compare; images that are scored in `output_dir` are not drawn again.

    Image i of a prompt has the same noise for every model, so that models are compared pair by pair. Under `accelerate
    launch` the images are shared among the processes, which must see one `output_dir`; the main one writes the tables.

    Args:
        models: name to TAFS pipeline, or to (pipeline, adapter), the adapter (a LoRA, or a denoiser trained whole) a
            folder or a repository on the Hub. The first is what the others are compared with.
        prompts: strings, (prompt, metadata) pairs, rows with a `prompt`, or a dataset with that column.
        rewards: as the trainer's; weights don't matter.
        output_dir: for scores, tables, grids and plots.
        num_steps: step counts.
        samplers: "annealed", "ode".
        sizes: (height, width) pairs; by default 512 pixels, or the model's own size where that is smaller.
        guidance_scale: above 1 with classifier-free guidance, at twice the evaluations.
        embedded_guidance_scale: the input of a guidance-distilled denoiser; None for the family's default.
        negative_prompt: with guidance.
        images_per_prompt: diversity needs two.
        batch_size: images at once; the last batch is padded.
        seed: of the noise.
        step_rewards: score the clean estimate of every step, for the correlation with the result (Table 7).
        grid_prompts: prompts shown in the grids, and whose images are saved.
        max_sequence_length: tokens of a prompt.
        offload_text_encoders: keep the text encoders on the GPU only while they encode all prompts, before any image.
        reward_options: the options that the rewards were made with, by name. They are only recorded, so that scores
            of other options aren't taken for this evaluation's.
        resamples: of the bootstrap.
        levels: of the steps: "uniform", or "scheduler", as `sample_levels` in training.

    Returns:
        The `Results`, the same on every process.

    Raises:
        ValueError: the settings can't work, or `output_dir` holds an evaluation of other settings.
        RewardError: a reward failed; what was scored before is kept.
        NonFiniteError: a denoiser or a VAE made NaN or infinity.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as `Accelerator` reads it: else one process
    folder = Path(output_dir)
    named = {name: value if isinstance(value, tuple) else (value, None) for name, value in models.items()}
    _check(named, samplers, num_steps, images_per_prompt, batch_size)
    items = _items(prompts, [pipeline for pipeline, _ in named.values()])
    judges = rewards if isinstance(rewards, RewardSet) else RewardSet(rewards)
    encoding = {"guidance_scale": guidance_scale, "embedded_guidance_scale": embedded_guidance_scale}
    encoding |= {"negative_prompt": negative_prompt or "", "max_sequence_length": max_sequence_length}
    task = Task(
        items, images_per_prompt, seed, batch_size, judges, step_rewards, grid_prompts, encoding, reward_options or {}
    )
    asked = (samplers, num_steps, sizes, encoding, levels)
    ways = {name: _samplings(pipeline, *asked) for name, (pipeline, _) in named.items()}
    _record_settings(folder, task.identity(), state)
    for name, (pipeline, adapter) in named.items():
        known = {"adapter": fingerprint(adapter)} | _base_settings(pipeline)
        _record_settings(folder / "scores" / _safe(name), known, state)
    for name, (pipeline, adapter) in named.items():
        with applied(pipeline, adapter):
            _place(pipeline, state.device, offload_text_encoders)
            folders = {sampling: folder / "scores" / _safe(name) / sampling.label for sampling in ways[name]}
            shares = {sampling: _share(task, path, state) for sampling, path in folders.items()}
            state.wait_for_everyone()  # no process writes before all have read
            encode = _encoder(task, pipeline, {i for ids in shares.values() for i in ids}, state, offload_text_encoders)
            storage = pipeline.storage_dtype
            drawer = Drawer(pipeline, encode, pipeline.velocity, batch_size, seed, state.device, storage)
            for sampling, ids in shares.items():
                _score_all(task, drawer, sampling, ids, folders[sampling], state)
    samplings = {sampling.label: sampling for sampling in itertools.chain.from_iterable(ways.values())}
    state.wait_for_everyone()
    results = collect(folder, {name: _safe(name) for name in named}, list(samplings.values()), task, resamples)
    if state.is_main_process:
        write(results, folder)
    state.wait_for_everyone()
    return results


def _items(prompts: Any, pipelines: Sequence[Any]) -> tuple[Any, ...]:
    """Return the (prompt, metadata) pairs, each with the source pictures that every pipeline needs."""
    items = tuple(row_to_prompt(prompts[i]) for i in range(len(prompts)))
    if not items:
        raise ValueError("there are no prompts to evaluate on; give at least one")
    for pipeline in pipelines:
        check_source_pictures(pipeline, items, "prompts")
    return items


def _check(models: Mapping[str, Any], samplers: Any, num_steps: Any, images_per_prompt: int, batch_size: int) -> None:
    if not models:
        raise ValueError("there are no models to evaluate; give name: pipeline, or name: (pipeline, adapter)")
    for name, (pipeline, _) in models.items():
        if not isinstance(pipeline, TAFSPipelineMixin):
            raise ValueError(f"model {name!r} is a {type(pipeline).__name__}; load it as a TAFS pipeline")
    if len({_safe(name) for name in models}) < len(models):
        raise ValueError(f"the models' names {', '.join(models)} are the same as folders; choose others")
    unknown = [sampler for sampler in samplers if sampler not in SAMPLERS]
    if unknown or not samplers or not num_steps or min(num_steps) < 1:
        raise ValueError(f"samplers {list(samplers)} (of {', '.join(SAMPLERS)}) at {list(num_steps)} steps can't work")
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(f"images_per_prompt {images_per_prompt} and batch_size {batch_size} must be at least 1")


def _safe(name: str) -> str:
    """Return a model's name as a folder's."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name).strip(".") or "model"


def _place(pipeline: Any, device: torch.device, offload_text_encoders: bool) -> None:
    """Move the models to the device, and text encoders that wait to the CPU; bitsandbytes' stay where they are."""
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and not is_bitsandbytes(module):
            module.to("cpu" if offload_text_encoders and is_text_encoder(name) else device)


def _samplings(
    pipeline: Any, samplers: Any, num_steps: Any, sizes: Any, encoding: Mapping[str, Any], levels: str
) -> list[DrawSpec]:
    """Return all ways of drawing by a model; raise ValueError if it can't draw in one of them."""
    guidance, embedded = encoding["guidance_scale"], encoding["embedded_guidance_scale"]
    pipeline.check_guidance(guidance)
    pipeline.embedded_guidance(embedded)
    pipeline.check_sequence_length(encoding["max_sequence_length"])
    sizes = sizes or [pipeline.default_size()]
    for height, width in sizes:
        pipeline.check_size(height, width)
    pipeline.unshifted_levels(1, levels)
    return [
        DrawSpec(sampler, steps, height, width, guidance, embedded, levels)
        for (height, width), sampler, steps in itertools.product(sizes, samplers, num_steps)
    ]


def _base_settings(pipeline: TAFSPipelineMixin) -> dict[str, Any]:
    """Return what a model's base is known by, beside its weights: where it came from, and how it computes."""
    base = base_identity(pipeline)
    carried = [asdict(frozen_adapter(pipeline.denoiser, name)) for name in active_adapters(pipeline.denoiser)]
    carried += [{"fused": name} for name in base.fused]
    return {
        "pipeline": base.pipeline_class,
        "base": base.location,
        "revision": base.revision,
        "commit": base.commit,
        "dtype": base.dtype,
        "quantized": base.quantization,
        "carried": carried or None,
    }


def _record_settings(folder: Path, settings: dict[str, Any], state: Any) -> None:
    """Record the settings in the folder; raise ValueError if it already holds other settings."""
    path, settings = folder / "evaluation.json", json.loads(json.dumps(without_secrets(settings), default=str))
    if state.is_main_process and not path.exists():
        write_whole(path, json.dumps(settings, indent=1))
    state.wait_for_everyone()
    found = json.loads(path.read_text())
    other = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
    if other:
        asked = {key: settings[key] for key in other}
        raise ValueError(f"{folder} holds an evaluation with {other}, asked for is {asked}; choose another output_dir")


def _share(task: Task, folder: Path, state: Any) -> list[int]:
    """Return this process's share of the images that aren't there yet."""
    done = read_scores(folder)
    return [i for i in range(len(task)) if i not in done][state.process_index :: state.num_processes]


def _encoder(task: Task, pipeline: TAFSPipelineMixin, ids: Set[int], state: Any, offload: bool) -> PromptEncoder:
    """Return an encoder that has encoded the prompts of these images, and keeps them all."""
    prompts = list(dict.fromkeys(task.prompts[i // task.images_per_prompt][0] for i in sorted(ids)))
    encode = PromptEncoder(pipeline, state.device, **task.encoding, offload=offload, cache_size=len(prompts))
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        encode(prompts[start : start + ENCODED_AT_ONCE])
    return encode


def _score_all(task: Task, drawer: Drawer, spec: DrawSpec, mine: Sequence[int], folder: Path, state: Any) -> None:
    """Draw and score these images, a line an image.

    Raises:
        RewardError, NonFiniteError: a reward failed, or a model made NaN or infinity, on any process; raised on all of
            them, the lines so far are kept.
    """
    from accelerate.utils import gather_object

    fault: RewardError | NonFiniteError | None = None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{state.process_index}.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" if torn else "")  # ends a line that a kill tore
        for start in range(0, len(mine), task.batch_size):
            ids = mine[start : start + task.batch_size]
            items = [task.prompts[i // task.images_per_prompt] for i in ids]
            try:
                images, values = draw_and_score(drawer, spec, task.rewards, items, ids, steps=task.step_rewards)
            except (RewardError, NonFiniteError) as error:  # the other processes wait below: stop together
                fault = error
                break
            for sample, image in zip(ids, images[:, -1], strict=True):  # before their lines: what has one is done
                prompt, number = divmod(sample, task.images_per_prompt)
                if prompt < task.keep_prompts and number == 0:
                    save_png(tensor_to_image(image), folder / f"{prompt}.png")
            file.write("".join(json.dumps(line) + "\n" for line in score_lines(task, ids, images[:, -1], values)))
            file.flush()
    faults = [found for found in gather_object([(isinstance(fault, NonFiniteError), str(fault or ""))]) if found[1]]
    if faults:
        non_finite, text = faults[0]
        kind = NonFiniteError if non_finite else RewardError
        raise kind(f"evaluation, {spec.label}: {text}; what was scored is kept in {folder}") from fault
