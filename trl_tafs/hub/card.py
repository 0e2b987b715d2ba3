"""The model card of an adapter: its facts, and the code that samples it."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from trl_tafs.hub.scrub import scrub
from trl_tafs.output.files import _write
from trl_tafs.output.markdown import _table

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from huggingface_hub import ModelCard


logger = logging.getLogger(__name__)


TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"


CURVE_FILE = "images/reward_curve.png"


SETTINGS_FILE = "training_settings.json"


FAMILY_TAGS = {
    "StableDiffusion3Pipeline": ["sd3", "sd3-diffusers"],
    "FluxPipeline": ["flux", "flux-diffusers"],
    "Flux2Pipeline": ["flux2", "flux2-diffusers"],
    "Flux2KleinPipeline": ["flux2", "flux2-diffusers"],
    "QwenImagePipeline": ["qwen-image", "qwen-image-diffusers"],
    "SanaPipeline": ["sana", "sana-diffusers"],
    "SanaSprintPipeline": ["sana", "sana-diffusers"],
    "ZImagePipeline": ["z-image", "z-image-diffusers"],
    "HiDreamImagePipeline": ["hidream", "hidream-diffusers"],
}


_REPOSITORY = r"[\w.-]+/[\w.-]+"


LIBRARIES = ("trl_tafs", "trl", "diffusers", "transformers", "peft", "accelerate", "torch")


def library_versions() -> dict[str, str]:
    """The installed version of each library that an adapter depends on."""
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
    call: Mapping[str, Any] | None = None  # steps, levels and guidance as the stock pipeline's call takes them
    whole_denoiser: str | None = None  # the class of the denoiser, where all of it was trained instead of a LoRA
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler"  # of the repository's scheduler
    drawn: str = "are noised again between steps"  # how the samples are made, `Kernel.description`
    anneals: bool = True  # whether the repository's scheduler does; the ODE's otherwise
    moved: str = "the model is moved towards those that compare well"  # `Objective.description`
    credited: str = "each step answers for its own image"  # `CreditRule.description`
    scores_every_step: bool = False  # or the final image alone
    max_sequence_length: int | None = None  # tokens of a prompt, where it isn't the pipeline's default
    torch_dtype: str = "float32"  # the base model's
    base_model: str | None = None  # "org/name", None if it isn't on the Hub
    base_name: str = "base model"  # what the card calls it
    base_revision: str | None = None  # of base_model, the branch, tag or commit that was trained on, if asked for
    base_llama: str | None = None  # where HiDream's Llama came from, which its repository lacks
    base_license: str | None = None  # the Hub's identifier, None if unknown
    base_license_name: str | None = None  # where the identifier is "other"
    base_license_link: str | None = None
    repo_id: str | None = None  # where the adapter is going, None for this folder
    prompts: Sequence[str] = ()  # the first one is the example's
    training: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)  # name to weight
    reward_curve: Sequence[tuple[int, float]] = ()  # (epoch, mean reward)
    metrics: Mapping[str, Any] = field(default_factory=dict)  # name to a number, or to numbers by column
    pictures: Sequence[tuple[str, str | None, str]] = ()  # (prompt, before, after), "images/<name>.png"
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __post_init__(self):  # noqa: D105
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


def base_model_facts(pipeline: DiffusionPipeline) -> dict[str, str | None]:
    """The `base_*` fields of `CardFacts`, of the model that the pipeline was loaded from.

    A folder is named by its last component, unless it is a snapshot in the Hub's cache; the licence is the
    one of its card. A licence that cannot be read is None, and a warning says so.
    """
    source = str(pipeline.config.get("_name_or_path") or "")
    folder = Path(source).resolve() if source and Path(source).is_dir() else None
    if folder is not None:
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", folder.as_posix() + "/")
        repo_id = "/".join(cached.groups()) if cached else None
    else:
        repo_id = source if re.fullmatch(_REPOSITORY, source) else None
    data = _base_card_data(folder, repo_id)
    llama = str(getattr(getattr(pipeline, "text_encoder_4", None), "name_or_path", ""))
    link = data.get("license_link")
    if link and "://" not in link:
        link = f"https://huggingface.co/{repo_id}/blob/main/{link}" if repo_id else None
    return {
        "base_model": repo_id,
        "base_name": repo_id or (folder.name if folder else type(pipeline).__name__),
        "base_revision": getattr(pipeline, "base_revision", None) if repo_id else None,
        "base_llama": llama if re.fullmatch(_REPOSITORY, llama) and not Path(llama).is_dir() else None,
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


def usage_code(facts: CardFacts, *, base: str | None = None, adapter: str | None = None) -> str:
    """Python that samples the adapter in plain diffusers and writes image.png.

    `base` and `adapter`, where given, replace the repositories: folders of this machine, to run it here.
    """
    options = f", revision={_quoted(facts.base_revision)}" if facts.base_revision and not base else ""
    base = base or facts.base_model or facts.base_name
    adapter = adapter or facts.repo_id or "."
    where = "" if facts.base_model else "  # the folder of the base model"
    arguments = {**facts.call, "height": facts.height, "width": facts.width}
    if facts.max_sequence_length:
        arguments["max_sequence_length"] = facts.max_sequence_length
    call = "\n".join(
        f"    {name}={_quoted(value) if isinstance(value, str) else value!r}," for name, value in arguments.items()
    )
    prompt = facts.prompts[0] if facts.prompts else "a photo of a cat"
    dtype = "" if facts.torch_dtype == "float32" else f", torch_dtype=torch.{facts.torch_dtype}"
    classes, imports, parts = {facts.scheduler_class, facts.pipeline_class}, "", ""
    if facts.base_llama:
        imports = "\nfrom transformers import AutoTokenizer, LlamaForCausalLM"
        outputs = "output_hidden_states=True, output_attentions=True"
        parts = f"""\
tokenizer_4 = AutoTokenizer.from_pretrained({_quoted(facts.base_llama)})
text_encoder_4 = LlamaForCausalLM.from_pretrained({_quoted(facts.base_llama)}, {outputs}{dtype})
"""
        options += ", tokenizer_4=tokenizer_4, text_encoder_4=text_encoder_4"
    if facts.whole_denoiser:
        classes.add(facts.whole_denoiser)
        parts += f"""\
transformer = {facts.whole_denoiser}.from_pretrained({_quoted(adapter)}, subfolder="transformer"{dtype})
"""
        options += ", transformer=transformer"
    lora = "" if facts.whole_denoiser else f"\npipe.load_lora_weights({_quoted(adapter)})"
    return f"""\
import torch
from diffusers import {", ".join(sorted(classes))}{imports}

{parts}pipe = {facts.pipeline_class}.from_pretrained({_quoted(base)}{options}{dtype}){where}{lora}
pipe.scheduler = {facts.scheduler_class}.from_pretrained({_quoted(adapter)}, subfolder="scheduler")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

torch.manual_seed(0){"  # the first noise and the re-noising" if facts.anneals else ""}
image = pipe(
    prompt={_quoted(prompt)},
{call}
).images[0]
image.save("image.png")"""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def create_model_card(facts: CardFacts) -> ModelCard:
    """The card: metadata that the Hub accepts, and the text of templates/model_card.md."""
    from huggingface_hub import ModelCard, ModelCardData

    other = facts.base_license == "other"
    data = ModelCardData(
        library_name="diffusers",
        base_model=facts.base_model,
        base_model_relation=("finetune" if facts.whole_denoiser else "adapter") if facts.base_model else None,
        license=facts.base_license,
        license_name=facts.base_license_name if other else None,
        license_link=facts.base_license_link if other else None,
        pipeline_tag="text-to-image",
        tags=[
            *("text-to-image", "diffusers", "diffusers-training"),
            *(() if facts.whole_denoiser else ("lora", "template:sd-lora")),
            *("trl", "tafs-grpo", *FAMILY_TAGS.get(facts.pipeline_class, [])),
        ],
        widget=[{"text": prompt, "output": {"url": after}} for prompt, _, after in facts.pictures] or None,
    )
    name = facts.base_name
    base = f"[{name}](https://huggingface.co/{facts.base_model})" if facts.base_model else name
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        title=(facts.repo_id or f"{name}-tafs-lora").split("/")[-1],
        base=base,
        usage=usage_code(facts),
        method=_method(facts),
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        licence=_licence(facts, base),
        **_tables(facts),
    )


def _method(facts: CardFacts) -> str:
    """How it was trained, in a sentence."""
    scored = "the final images are scored and compared with those of the same prompt"
    if facts.scores_every_step:
        scored = "every step's clean images are scored and compared with those of the same prompt and step"
        scored += f", {facts.credited}"
    return f"the model's own {facts.num_steps}-step samples {facts.drawn}, {scored}, and {facts.moved}"


def _tables(facts: CardFacts) -> dict[str, str]:
    """The template's tables, each "" where there is nothing to show."""
    metrics = [(k, row if isinstance(row, Mapping) else {"value": row}) for k, row in facts.metrics.items()]
    columns = list(dict.fromkeys(column for _, row in metrics for column in row))
    pictures = [
        (prompt, f"![before]({before})" if before else "", f"![after]({after})")
        for prompt, before, after in facts.pictures
    ]
    return {
        "levels": _table(
            ["step", "passed", "seen by the model"],
            zip(range(1, facts.num_steps + 1), facts.levels_unshifted, facts.levels, strict=True),
        ),
        "pictures": _table(["prompt", "before", "after"], pictures),
        "metrics": _table(
            ["", *columns], [[name, *(row.get(column, "") for column in columns)] for name, row in metrics]
        ),
        "rewards": _table(["reward", "weight"], facts.rewards.items()),
        "training": _table(["setting", "value"], [(k, f"`{v}`") for k, v in facts.training.items()]),
        "curve": _curve(facts.reward_curve),
    }


def _curve(curve: Sequence[tuple[int, float]]) -> str:
    if curve and importlib.util.find_spec("matplotlib"):
        return f"![mean reward by epoch]({CURVE_FILE})"
    last = len(curve) - 1  # otherwise, at most 10 of the epochs, evenly spaced
    picked = sorted({round(i * last / 9) for i in range(10)}) if curve else []
    return _table(["epoch", "reward"], [curve[i] for i in picked])


def _licence(facts: CardFacts, base: str) -> str:
    if facts.base_license is None:
        return f"The licence of {base} applies to what is made with it; read it there."
    name = facts.base_license_name or facts.base_license
    name = f"[{name}]({facts.base_license_link})" if facts.base_license_link else name
    return f"That of {base}: {name}."


def write_model_card(facts: CardFacts, folder: str | os.PathLike) -> Path:
    """Write README.md, the scrubbed training_settings.json, and the reward curve if matplotlib is there."""
    folder = Path(folder)
    if facts.reward_curve and importlib.util.find_spec("matplotlib"):
        _write(folder / CURVE_FILE, _plot(facts.reward_curve))
    _write(folder / SETTINGS_FILE, json.dumps(facts.training, indent=2).encode())
    _write(folder / "README.md", str(create_model_card(facts)).encode())
    return folder / "README.md"


def _plot(curve: Sequence[tuple[int, float]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True))
    axes.set(xlabel="epoch", ylabel="mean reward")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
