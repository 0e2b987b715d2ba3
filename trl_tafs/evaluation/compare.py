"""`trl_tafs.evaluate()`: models on a prompt set, the same noise for each; resumable, on any number of processes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from trl_tafs.evaluation.drawing import SAMPLERS, Setting, sample_step_images
from trl_tafs.evaluation.results import Results, collect
from trl_tafs.evaluation.scores import Sampling, Task, read_scores
from trl_tafs.evaluation.statistics import IMAGE_STATISTICS, thumbnails
from trl_tafs.evaluation.tables import write
from trl_tafs.output.pictures import save_png, tensor_to_image
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.quantized import is_bitsandbytes, is_quantized
from trl_tafs.policy.adapter_file import SCHEDULER_FILE, WEIGHT_NAME
from trl_tafs.policy.denoiser_file import applied
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
) -> Results:
    """Draw, score and compare; what is in `output_dir` already is not done again.

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
        embedded_guidance_scale: what a guidance-distilled denoiser is given; None for the family's default.
        negative_prompt: with guidance.
        images_per_prompt: diversity needs two.
        batch_size: images at once; the last batch is padded.
        seed: of the noise.
        step_rewards: score the clean estimate of every step, for the correlation with the result (Table 7).
        grid_prompts: prompts shown in the grids, and whose images are saved.
        max_sequence_length: tokens of a prompt.
        offload_text_encoders: they are on the GPU only while they encode: all prompts, before the first image.
        reward_options: what the rewards were made with, by name. They aren't made here: scores of other options are
            another evaluation's, which can't be told from the rewards themselves.
        resamples: of the bootstrap.

    Returns:
        A `tables.Results`, the same on every process.

    Raises:
        ValueError: settings can't work, or `output_dir` holds an evaluation of other settings.
        RewardError: a reward failed; what was scored before is kept.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as `Accelerator` reads it: else one process
    folder = Path(output_dir)
    named = {name: value if isinstance(value, tuple) else (value, None) for name, value in models.items()}
    _check(named, samplers, num_steps, images_per_prompt, batch_size)
    items = tuple(row_to_prompt(prompts[i]) for i in range(len(prompts)))
    if not items:
        raise ValueError("there are no prompts to evaluate on; give at least one")
    judges = rewards if isinstance(rewards, RewardSet) else RewardSet(rewards)
    encoding = {"guidance_scale": guidance_scale, "embedded_guidance_scale": embedded_guidance_scale}
    encoding |= {"negative_prompt": negative_prompt or "", "max_sequence_length": max_sequence_length}
    task = Task(
        items, images_per_prompt, seed, batch_size, judges, step_rewards, grid_prompts, encoding, reward_options or {}
    )
    ways = {name: _samplings(pipeline, samplers, num_steps, sizes, encoding) for name, (pipeline, _) in named.items()}
    _claim(folder, task.identity(), state)
    for name, (pipeline, adapter) in named.items():
        _claim(folder / "scores" / _safe(name), {"adapter": fingerprint(adapter)} | base_identity(pipeline), state)
    for name, (pipeline, adapter) in named.items():
        with applied(pipeline, adapter):
            _place(pipeline, state.device, offload_text_encoders)
            folders = {sampling: folder / "scores" / _safe(name) / sampling.label for sampling in ways[name]}
            shares = {sampling: _share(task, path, state) for sampling, path in folders.items()}
            state.wait_for_everyone()  # no process writes before all have read
            encode = _encoder(task, pipeline, {i for ids in shares.values() for i in ids}, state, offload_text_encoders)
            for sampling, ids in shares.items():
                _score_all(task, pipeline, encode, sampling, ids, folders[sampling], state)
    samplings = {sampling.label: sampling for sampling in itertools.chain.from_iterable(ways.values())}
    state.wait_for_everyone()
    results = collect(folder, {name: _safe(name) for name in named}, list(samplings.values()), task, resamples)
    if state.is_main_process:
        write(results, folder)
    state.wait_for_everyone()
    return results


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
    """A model's name as a folder's."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name).strip(".") or "model"


def _place(pipeline: Any, device: torch.device, offload_text_encoders: bool) -> None:
    """The models on the device, text encoders off it where they wait there; bitsandbytes' stay where they are."""
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and not is_bitsandbytes(module):
            module.to("cpu" if offload_text_encoders and name.startswith("text_encoder") else device)


def _samplings(pipeline: Any, samplers: Any, num_steps: Any, sizes: Any, encoding: Mapping[str, Any]) -> list[Sampling]:
    """All ways of drawing by a model, which must be able to."""
    guidance, embedded = encoding["guidance_scale"], encoding["embedded_guidance_scale"]
    pipeline.check_guidance(guidance)
    pipeline.embedded_guidance(embedded)
    pipeline.check_sequence_length(encoding["max_sequence_length"])
    sizes = sizes or [pipeline.default_size()]
    for height, width in sizes:
        pipeline.check_size(height, width)
    return [
        Sampling(sampler, steps, height, width, guidance, embedded)
        for (height, width), sampler, steps in itertools.product(sizes, samplers, num_steps)
    ]


def fingerprint(adapter: str | None) -> str | None:
    """What an adapter is known by: the digest of its weights where it is local, else its commit on the Hub.

    Without the Hub it is the commit in its cache, and the name where there is none.
    """
    if adapter is None:
        return None
    local = Path(adapter)
    if not local.exists():
        return _commit(str(adapter)) or str(adapter)
    digest = hashlib.sha256()
    files = [local] if local.is_file() else [*local.glob("*.safetensors"), *local.glob("*/*.safetensors")]
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _commit(repo_id: str) -> str | None:
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(repo_id).sha
    except Exception:  # of whichever HTTP library the Hub's client has: what can't be asked is looked up in the cache
        pass
    for name in (WEIGHT_NAME, SCHEDULER_FILE, "transformer/config.json"):
        with contextlib.suppress(ValueError):  # a name that no repository has
            found = re.search(r"[/\\]snapshots[/\\](\w+)", str(try_to_load_from_cache(repo_id, name)))
            if found:
                return found[1]
    return None


def base_identity(pipeline: TAFSPipelineMixin) -> dict[str, Any]:
    """What a model's base is known by, beside its weights: where it came from, and how it computes."""
    source, denoiser = str(pipeline.config.get("_name_or_path") or ""), pipeline.denoiser
    bits = next((bits for bits in ("4bit", "8bit") if getattr(denoiser, f"is_loaded_in_{bits}", False)), None)
    return {
        "pipeline": pipeline.stock_class().__name__,
        "base": str(Path(source).resolve()) if Path(source).is_dir() and source else source,
        "revision": pipeline.base_revision,
        "dtype": str(pipeline.model_dtype).removeprefix("torch."),
        "quantized": bits or is_quantized(denoiser),
    }


def _claim(folder: Path, identity: dict[str, Any], state: Any) -> None:
    """Mark a folder as this evaluation's, or this model's, or say what it is of instead."""
    path, identity = folder / "evaluation.json", json.loads(json.dumps(identity, default=str))
    if state.is_main_process and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(identity, indent=1))
    state.wait_for_everyone()
    found = json.loads(path.read_text())
    other = {key: found.get(key) for key in identity if found.get(key) != identity[key]}
    if other:
        asked = {key: identity[key] for key in other}
        raise ValueError(f"{folder} holds an evaluation with {other}, asked for is {asked}; choose another output_dir")


def _share(task: Task, folder: Path, state: Any) -> list[int]:
    """This process's share of the images that aren't there yet."""
    done = read_scores(folder)
    return [i for i in range(len(task)) if i not in done][state.process_index :: state.num_processes]


def _encoder(task: Task, pipeline: TAFSPipelineMixin, ids: Set[int], state: Any, offload: bool) -> PromptEncoder:
    """An encoder that has encoded the prompts of these images, and keeps them all."""
    prompts = list(dict.fromkeys(task.prompts[i // task.images_per_prompt][0] for i in sorted(ids)))
    encode = PromptEncoder(pipeline, state.device, **task.encoding, offload=offload, cache_size=len(prompts))
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        encode(prompts[start : start + ENCODED_AT_ONCE])
    return encode


def _score_all(
    task: Task, pipeline: Any, encode: Any, sampling: Sampling, mine: Sequence[int], folder: Path, state: Any
) -> None:
    """Draw and score these images, a line an image."""
    from accelerate.utils import gather_object

    fault: RewardError | None = None
    folder.mkdir(parents=True, exist_ok=True)
    storage = pipeline.storage_dtype
    setting = Setting(sampling.height, sampling.width, task.batch_size, task.seed, storage, state.device)
    path = folder / f"rank{state.process_index}.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(path.read_bytes() + b"\n")  # what a kill tore ends here
    with path.open("a") as file:
        for start in range(0, len(mine), task.batch_size):
            ids = mine[start : start + task.batch_size]
            try:
                rows = _score(task, pipeline, encode, sampling, setting, ids, folder)
            except RewardError as error:  # the other processes wait below: stop together
                fault = error
                break
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
    faults = [text for text in gather_object([str(fault or "")]) if text]
    if faults:
        raise RewardError(f"evaluation: {faults[0]}; what was scored is kept in {folder}") from fault


def _score(
    task: Task, pipeline: Any, encode: Any, sampling: Sampling, setting: Setting, ids: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    pairs = [task.prompts[i // task.images_per_prompt] for i in ids]
    prompts, metadata = [prompt for prompt, _ in pairs], [row for _, row in pairs]
    how = {"sampler": sampling.sampler, "num_steps": sampling.num_steps, "steps": task.step_rewards}
    images = sample_step_images(pipeline, encode, pipeline.velocity, setting, prompts, ids, **how)
    steps = [task.rewards(column, prompts, metadata).values for column in images.unbind(1)]  # N of (B, R)
    final = images[:, -1]
    statistics = {name: measure(final) for name, measure in IMAGE_STATISTICS.items()}
    small = thumbnails(final)
    rows = []
    for b, sample in enumerate(ids):
        row: dict[str, Any] = {"sample": sample, "prompt": sample // task.images_per_prompt}
        row["rewards"] = dict(zip(task.rewards.names, _numbers(steps[-1][b]), strict=True))
        row["statistics"] = {name: round(values[b].item(), 6) for name, values in statistics.items()}
        row["thumbnail"] = base64.b64encode(small[b].numpy().tobytes()).decode("ascii")
        if task.step_rewards:
            row["steps"] = {name: _numbers([s[b, r] for s in steps]) for r, name in enumerate(task.rewards.names)}
        if row["prompt"] < task.keep_prompts and sample % task.images_per_prompt == 0:
            save_png(tensor_to_image(final[b]), folder / f"{row['prompt']}.png")
        rows.append(row)
    return rows


def _numbers(values: Any) -> list[float | None]:
    return [None if value != value else float(value) for value in values]
