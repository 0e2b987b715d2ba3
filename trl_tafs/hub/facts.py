"""What the card of an adapter says: the facts of a run, and of the base model that it trained."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from trl_tafs.hub.scrub import scrub
from trl_tafs.method.papers import TAFS_GRPO, Paper
from trl_tafs.pipelines.identity import REPOSITORY, base_identity

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from trl_tafs.policy.carried import FrozenAdapter

logger = logging.getLogger(__name__)

LIBRARIES = ("trl_tafs", "trl", "diffusers", "transformers", "peft", "accelerate", "torch")


def library_versions() -> dict[str, str]:
    """Return the installed version of each library that an adapter depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout, or not needed by this run
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card of an adapter says; `training`, `rewards` and `metrics` are scrubbed on the way in."""

    pipeline_class: str  # diffusers' class that loads it, "StableDiffusion3Pipeline"
    num_steps: int  # N
    levels_unshifted: Sequence[float]  # (N,) as the user passes them, `sigmas`
    levels: Sequence[float]  # (N,) as the model saw them, after the scheduler's shift
    height: int
    width: int
    guidance_scale: float = 1.0
    embedded_guidance: float | None = None  # what a guidance-distilled denoiser was given
    call: Mapping[str, Any] | None = None  # steps, levels and guidance as the stock pipeline's call takes them
    whole_denoiser: str | None = None  # the class of the denoiser, where all of it was trained instead of a LoRA
    denoiser_name: str = "transformer"  # the pipeline's component that was trained
    loads_lora: bool = True  # whether the stock pipeline has `load_lora_weights`; else its denoiser loads the LoRA
    adapter_name: str = "default"  # the trained LoRA's, where others are beneath it
    frozen: Sequence[FrozenAdapter] = ()  # LoRAs that were active and frozen beneath it
    comfyui_shift: float | None = None  # by which ComfyUI shifts this family's levels; None: no recipe for it
    papers: Sequence[Paper] = (TAFS_GRPO,)  # that the run used
    epochs: int | None = None  # that the weights have been trained for
    card_tags: Sequence[str] = ()  # the family's, of its pipeline class
    renoises_from_generator: bool = False  # whether the stock pipeline hands its generator to the scheduler
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler"  # of the repository's scheduler
    drawn: str = "are noised again between steps"  # how the samples are made, `Kernel.description`
    anneals: bool = True  # whether the repository's scheduler does; the ODE's otherwise
    moved: str = "the model is moved towards those that compare well"  # `Objective.description`
    credited: str = "each step answers for its own image"  # `CreditRule.description`
    scores_every_step: bool = False  # or the final image alone
    max_sequence_length: int | None = None  # tokens of a prompt, where it isn't the pipeline's default
    dtype: str = "float32"  # the base model's
    base_model: str | None = None  # "org/name", None if it isn't on the Hub
    base_name: str = "base model"  # what the card calls it
    base_revision: str | None = None  # of base_model, the branch, tag or commit that was trained on, if asked for
    base_llama: str | None = None  # where HiDream's Llama came from, which its repository lacks
    base_fused: Sequence[str] = ()  # names of LoRAs that were fused into it before it was trained on
    base_license: str | None = None  # the Hub's identifier, None if unknown
    base_license_name: str | None = None  # where the identifier is "other"
    base_license_link: str | None = None
    model_name: str | None = None  # the card's title; None: the repository's name, or one made of the base's
    datasets: Sequence[str] = ()  # the Hub's, that the prompts are of
    tags: Sequence[str] = ()  # the user's
    repo_id: str | None = None  # where the adapter is going, None for this folder
    prompts: Sequence[str] = ()  # the first one is the example's
    training: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)  # name to weight
    reward_curve: Sequence[tuple[int, float]] = ()  # (epoch, mean reward)
    metrics: Mapping[str, Any] = field(default_factory=dict)  # name to a number, or to numbers by column
    pictures: Sequence[tuple[str, str | None, str]] = ()  # (prompt, before, after), "images/<name>.png"
    sources: Sequence[Sequence[str]] = ()  # of each of `pictures`, the source pictures of its prompt, where it has some
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __post_init__(self) -> None:
        if not self.num_steps == len(self.levels) == len(self.levels_unshifted):
            raise ValueError(
                f"{self.num_steps} steps need as many levels (without the final 0); levels has "
                f"{len(self.levels)}, levels_unshifted {len(self.levels_unshifted)}"
            )
        for path in (path for _, *paths in self.pictures for path in paths if path is not None):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"picture {path!r} isn't relative to the card; use 'images/<name>.png'")
        if self.call is None:
            levels = [float(level) for level in self.levels_unshifted]
            usual = {"num_inference_steps": self.num_steps, "sigmas": levels, "guidance_scale": self.guidance_scale}
            object.__setattr__(self, "call", usual)
        for name in ("training", "rewards", "metrics"):
            object.__setattr__(self, name, scrub(getattr(self, name)))


def base_model_facts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the `base_*` fields of `CardFacts`, of the model that the pipeline was loaded from.

    A folder is named by its last component, unless it is a snapshot in the Hub's cache; the licence is the
    one of its card. A licence that cannot be read is None, and a warning says so.
    """
    base = base_identity(pipeline)
    data = _base_card_data(base.folder, base.repo_id)
    llama = str(getattr(getattr(pipeline, "text_encoder_4", None), "name_or_path", ""))
    link = data.get("license_link")
    if link and "://" not in link:
        link = f"https://huggingface.co/{base.repo_id}/blob/main/{link}" if base.repo_id else None
    return {
        "base_model": base.repo_id,
        "base_name": base.name,
        "base_revision": base.revision if base.repo_id else None,
        "base_fused": base.fused,
        "base_llama": llama if REPOSITORY.fullmatch(llama) and not Path(llama).is_dir() else None,
        "base_license": data.get("license"),
        "base_license_name": data.get("license_name"),
        "base_license_link": link,
    }


def _base_card_data(folder: Path | None, repo_id: str | None) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    readme = folder / "README.md" if folder is not None else None
    try:
        if readme is not None and readme.is_file():
            return ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
        if repo_id is not None:
            return ModelCard.load(repo_id, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError) as error:  # the network, or a card that isn't YAML
        logger.warning("no licence from the card of %s (%s); add it to the adapter's", repo_id or readme, error)
    return {}
