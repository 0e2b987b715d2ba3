"""What a run publishes: weights, model card and pictures, in a folder and on the Hub."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.hub.card import write_model_card
from trl_tafs.hub.facts import CardFacts, base_model_facts
from trl_tafs.hub.names import check_repo_id
from trl_tafs.hub.options import PublishingOptions
from trl_tafs.hub.push import PushError, kept, prepare_repo, push_folder, push_in_background
from trl_tafs.method.papers import Paper
from trl_tafs.output.errors import first_line
from trl_tafs.output.files import is_disk_fault
from trl_tafs.output.pictures import save_png, tensor_to_image
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.pipelines.pictures import pictures_of
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.sharding import is_sharded
from trl_tafs.processes import raise_everywhere
from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.training.divergence import check_weights
from trl_tafs.training.progress import Progress

CARD_PICTURES = 4
Write = Callable[[Path], None]  # writes something in a folder


def written(place: Path, moved: str | None, steps: Sequence[Write], before: Sequence[Write] = ()) -> Path:
    """Take these steps of writing in a folder; return it, or a temporary one where the disk fails.

    Args:
        place: the folder.
        moved: how the temporary folder's name begins; None: a disk's fault is raised.
        steps: what to write.
        before: what was written in the folder before: it is written in the temporary one, too.
    """
    try:
        for step in steps:
            step(place)
        return place
    except Exception as error:  # safetensors' disk errors share no base class with OSError
        if moved is None or not is_disk_fault(error):
            raise
        reason = first_line(error)
    failed, place = place, Path(tempfile.mkdtemp(prefix=moved))
    for step in (*before, *steps):
        step(place)
    warnings.warn(f"{failed} can't be written ({reason}): the adapter is in {place}", stacklevel=5)
    return place


@dataclass
class Publisher:
    """Writes and pushes what was trained, with what a run is known by."""

    policy: Policy
    config: PublishingOptions
    settings: dict[str, Any]  # resolved, for the card and training_settings.json
    levels: Sequence[float]  # (N,) as the model sees them
    rewards: RewardSet
    progress: Progress
    prompts: Callable[[], Sequence[str]]  # some of which are shown on the card
    drawer: Drawer
    spec: DrawSpec  # how its pictures are drawn
    papers: Sequence[Paper]  # that the run used
    naming: dict[str, Any] = field(default_factory=dict)  # facts that the user gives the card

    def name_card(
        self, model_name: str | None, dataset_name: str | Sequence[str] | None, tags: str | Sequence[str] | None
    ) -> None:
        """Take a title, datasets and tags for this card and later ones; None leaves each as it was.

        Raises:
            ValueError: a name that no dataset on the Hub can have.
        """
        given: dict[str, Any] = {"model_name": model_name}
        for name, value in (("datasets", dataset_name), ("tags", tags)):
            given[name] = (value,) if isinstance(value, str) else None if value is None else tuple(value)
        for name in given["datasets"] or ():
            check_repo_id(name, "dataset_name")
        self.naming |= {name: value for name, value in given.items() if value is not None}

    def card_prompts(self) -> list[str]:
        """Return the few prompts that the card shows."""
        return list(dict.fromkeys(self.prompts()))[:CARD_PICTURES]

    def save(self, folder: str | os.PathLike | None = None, repo_id: str | None = None) -> Path:
        """Write the averaged weights as plain diffusers loads them, the scheduler, pictures and the card.

        Every process calls it; the main one writes. By default to `<run>/adapter` or, where the disk fails there, to a
        temporary folder that a warning names.

        Raises:
            NonFiniteError: a trained weight isn't finite, and nothing is written; or the weights are, and draw NaN.
        """
        place, accelerator = Path(folder or self.default_folder), self.policy.accelerator
        check_weights(self.policy, self.config, f"after {self.progress.epoch} epochs")
        main, name = accelerator.is_main_process, None if folder else f"{Path(self.config.run_name).name}-adapter-"
        if main:  # the weights first: whatever happens to the pictures, they are there
            place = written(place, name, [self._write_weights])
        pictures, fault = self._pictures() if main or is_sharded(accelerator) else ({}, None)
        if main:
            name = name if place == Path(self.default_folder) else None
            show = partial(self._write_pictures_and_card, pictures=pictures, repo_id=repo_id)
            place = written(place, name, [show], before=[self._write_weights])
        raise_everywhere(accelerator, fault, NonFiniteError, f"the weights in {place} can't be sampled")
        return place

    def _write_weights(self, folder: Path) -> None:
        with self.policy.averaged():
            self.policy.publish(folder)

    def _write_pictures_and_card(self, folder: Path, pictures: Mapping[str, Tensor], repo_id: str | None) -> None:
        """Write the pictures by their names, those that the prompts came with, and the card."""
        for name, image in pictures.items():
            save_png(tensor_to_image(image), folder / "images" / f"{name}.png")
        prompts = self.card_prompts()
        for prompt, names in zip(prompts, source_names(prompts), strict=True):
            for picture, path in zip(pictures_of(prompt), names, strict=True):
                save_png(picture.image(), folder / path)
        self.write_card(folder, repo_id)

    def write_card(self, folder: str | os.PathLike | None = None, repo_id: str | None = None) -> Path | None:
        """Write README.md and training_settings.json beside the weights, on the main process."""
        if not self.policy.accelerator.is_main_process:
            return None
        folder = Path(folder or self.default_folder)
        folder.mkdir(parents=True, exist_ok=True)
        return write_model_card(self.facts(folder, repo_id), folder)

    def push(
        self, repo_id: str | None, token: str | None, private: bool | None, *, blocking: bool = True, **options: Any
    ) -> Any:
        """Save, then push; `options` as `push_folder` takes them. None on all but the main process.

        Without `blocking` the folder is uploaded in the background, and a future comes back.

        Raises:
            PushError: with the folder that the adapter is in, and the command that pushes it later.
        """
        try:
            repo_id = self.prepare_repo(repo_id, private, token)
        except PushError as error:  # the Hub can't be reached: what is to be pushed is saved first
            folder = self.save(repo_id=repo_id)
            later = kept(folder, repo_id or self.default_repo, private=private, revision=options.get("revision"))
            raise PushError(f"{error}{later}") from error
        folder = self.save(repo_id=repo_id)
        if not self.policy.accelerator.is_main_process:
            return None
        push = push_folder if blocking else push_in_background
        return push(folder, repo_id, private=private, token=token, **options)

    def prepare_repo(self, repo_id: str | None, private: bool | None, token: str | None = None) -> str:
        """Make the repository on the main process if it is missing, and return its whole name.

        Raises:
            ValueError: no repository can have that name.
            PushError: there is no token, or none that may write there.
        """
        repo_id = repo_id or self.default_repo
        check_repo_id(repo_id, "the repository")
        if not self.policy.accelerator.is_main_process:
            return repo_id
        return prepare_repo(repo_id, private=private, token=token)

    @property
    def default_folder(self) -> Path:
        """Where the adapter lies if nothing else is asked for."""
        return Path(self.config.project_dir) / "adapter"

    @property
    def default_repo(self) -> str:
        """The repository that the configuration names, or the run's name below the user's."""
        return self.config.hub_model_id or self.config.run_name

    @torch.no_grad()
    def _pictures(self) -> tuple[dict[str, Tensor], NonFiniteError | None]:
        """Draw `before_<i>` and `after_<i>`, (3, H, W): the same prompts and noise by the base and the policy.

        Returns:
            Those that are finite, and what is to be said of the first that isn't: the other processes wait for that.
        """
        pipeline, prompts, found = self.policy.pipeline, self.card_prompts(), {}
        with self.policy.averaged():
            for name, velocity in (("before", self.policy.reference), ("after", pipeline.velocity)):
                try:
                    images = replace(self.drawer, velocity=velocity).images(self.spec, prompts, range(len(prompts)))
                except NonFiniteError as error:
                    return found, error
                found |= {f"{name}_{i}": image for i, image in enumerate(images)}
        return found, None

    def facts(self, folder: str | os.PathLike, repo_id: str | None) -> CardFacts:
        """Return everything that the model card says."""
        config, pipeline, progress = self.config, self.policy.pipeline, self.progress
        prompts = self.card_prompts()
        pictures = [(str(p), f"images/before_{i}.png", f"images/after_{i}.png") for i, p in enumerate(prompts)]
        shown = [i for i, picture in enumerate(pictures) if Path(folder, picture[2]).exists()]
        sources = source_names(prompts)
        length = config.max_sequence_length or pipeline.default_max_sequence_length()
        return CardFacts(
            pipeline_class=type(pipeline).stock_class().__name__,
            num_steps=config.sample_num_steps,
            levels_unshifted=pipeline.unshifted_levels(config.sample_num_steps, config.sample_levels).tolist(),
            levels=list(self.levels),
            height=self.spec.height,
            width=self.spec.width,
            guidance_scale=config.sample_guidance_scale,
            embedded_guidance=pipeline.embedded_guidance(config.sample_embedded_guidance_scale),
            call=pipeline.call_arguments(
                config.sample_num_steps,
                config.sample_guidance_scale,
                config.negative_prompts,
                config.sample_embedded_guidance_scale,
                config.sample_levels,
            )
            | pipeline.size_arguments(self.spec.height, self.spec.width),
            adapter_name=self.policy.adapter_name or "",
            frozen=self.policy.frozen,
            comfyui_shift=pipeline.comfyui_shift,
            papers=self.papers,
            epochs=progress.epoch,
            card_tags=pipeline.card_tags,
            denoiser_name=pipeline.denoiser_name,
            loads_lora=hasattr(pipeline.stock_class(), "load_lora_weights"),
            renoises_from_generator=pipeline.renoises_from_generator,
            whole_denoiser=type(pipeline.denoiser).__name__ if config.full_finetuning else None,
            scheduler_class=type(pipeline.annealed_scheduler()).__name__,
            drawn=config.kernel_class.description,
            anneals=config.anneals,
            moved=config.objective_class.description,
            credited=config.credit_rule.description,
            scores_every_step=not (config.credits_final_image or config.credit_rule.final_only),
            max_sequence_length=None if length == pipeline.stock_max_sequence_length() else length,
            dtype=str(pipeline.model_dtype).removeprefix("torch."),
            **base_model_facts(pipeline),
            **self.naming,
            repo_id=repo_id,
            prompts=[str(prompt) for prompt in prompts],
            training=self.settings,
            rewards=dict(zip(self.rewards.names, self.rewards.weights.tolist(), strict=True)),
            reward_curve=progress.reward_curve,
            metrics=evaluation_columns(progress.evaluations),
            pictures=[pictures[i] for i in shown],
            sources=[sources[i] for i in shown],
        )


def source_names(prompts: Sequence[str]) -> list[list[str]]:
    """Return the card's files of each prompt's source pictures: `images/source_0.png`, `images/source_0_1.png`, ..."""
    return [
        [f"images/source_{i}{f'_{k}' if k else ''}.png" for k in range(len(pictures_of(prompt)))]
        for i, prompt in enumerate(prompts)
    ]


def evaluation_columns(evaluations: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the first evaluation and the last one as columns of a table, each named by its epoch."""
    columns: dict[str, dict[str, float]] = {}
    for evaluation in (*evaluations[:1], *evaluations[1:][-1:]):
        epoch = int(evaluation["epoch"])
        title = "before training" if epoch == 0 else f"after epoch {epoch}"
        for name, value in evaluation.items():
            if name.startswith("eval/"):
                columns.setdefault(name, {})[title] = value
    return columns
