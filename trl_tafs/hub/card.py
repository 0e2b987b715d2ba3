"""The model card of an adapter, from its facts, and the code that samples it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_tafs.hub.comfyui import recipe
from trl_tafs.hub.facts import CardFacts
from trl_tafs.output.files import write_whole
from trl_tafs.output.markdown import table

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from trl_tafs.policy.carried import FrozenAdapter

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
CURVE_FILE = "images/reward_curve.png"
SETTINGS_FILE = "training_settings.json"
UNSET = ("", "null")  # values of options that the card doesn't show


def usage_code(facts: CardFacts, *, base: str | None = None, adapter: str | None = None) -> str:
    """Return Python code that samples the adapter in plain diffusers and writes image.png.

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
    sources = list(facts.sources[0]) if facts.sources else []
    call = _source_argument(sources, facts.repo_id) + call if sources else call
    dtype = "" if facts.dtype == "float32" else f", dtype=torch.{facts.dtype}"
    classes, parts = {facts.scheduler_class, facts.pipeline_class}, ""
    imports = "\nfrom diffusers.utils import load_image" if sources else ""
    if facts.base_llama:
        imports += "\nfrom transformers import AutoTokenizer, LlamaForCausalLM"
        outputs = "output_hidden_states=True, output_attentions=True"
        parts = f"""\
tokenizer_4 = AutoTokenizer.from_pretrained({_quoted(facts.base_llama)})
text_encoder_4 = LlamaForCausalLM.from_pretrained({_quoted(facts.base_llama)}, {outputs}{dtype})
"""
        options += ", tokenizer_4=tokenizer_4, text_encoder_4=text_encoder_4"
    if facts.whole_denoiser:
        classes.add(facts.whole_denoiser)
        name = facts.denoiser_name
        parts += f"""\
{name} = {facts.whole_denoiser}.from_pretrained({_quoted(adapter)}, subfolder={_quoted(name)}{dtype})
"""
        options += f", {name}={name}"
    lora = "" if facts.whole_denoiser else _load_lora(facts, adapter)
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


def _load_lora(facts: CardFacts, adapter: str) -> str:
    """Return the lines that load the LoRA, and those that were frozen beneath it, which act in this order."""
    pipe, load, options = "pipe", "load_lora_weights", ""
    if not facts.loads_lora:
        pipe, load, options = f"pipe.{facts.denoiser_name}", "load_lora_adapter", ", use_safetensors=True"
    if not facts.frozen:
        return f"\n{pipe}.{load}({_quoted(adapter)}{options})"
    lines = [
        f"{pipe}.{load}({_quoted(a.name)}, adapter_name={_quoted(a.name)}{options})  # from where you have it"
        for a in facts.frozen
    ]
    lines.append(f"{pipe}.{load}({_quoted(adapter)}, adapter_name={_quoted(facts.adapter_name)}{options})")
    names = ", ".join(_quoted(name) for name in (*(a.name for a in facts.frozen), facts.adapter_name))
    weights = [1.0 if a.weight is None else round(a.weight, 6) for a in facts.frozen]
    lines.append(f"{pipe}.set_adapters([{names}], {[*weights, 1.0]})")
    return "".join(f"\n{line}" for line in lines)


def _source_argument(sources: Sequence[str], repo_id: str | None) -> str:
    """Return the call's line of the first prompt's source pictures, in the repository or beside the card."""
    root = f"https://huggingface.co/{repo_id}/resolve/main/" if repo_id else ""
    loaded = [f"load_image({_quoted(root + path)})" for path in sources]
    return f"    image={loaded[0] if len(loaded) == 1 else '[' + ', '.join(loaded) + ']'},\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def create_model_card(facts: CardFacts) -> ModelCard:
    """Return the card: metadata that the Hub accepts, and the text of templates/model_card.md."""
    from huggingface_hub import ModelCard, ModelCardData

    other = facts.base_license == "other"
    data = ModelCardData(
        library_name="diffusers",
        model_name=facts.model_name,
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        base_model_relation=("finetune" if facts.whole_denoiser else "adapter") if facts.base_model else None,
        license=facts.base_license,
        license_name=facts.base_license_name if other else None,
        license_link=facts.base_license_link if other else None,
        pipeline_tag=(task := "image-to-image" if any(facts.sources) else "text-to-image"),
        tags=[
            *(task, "diffusers", "diffusers-training"),
            *(() if facts.whole_denoiser else ("lora", "template:sd-lora")),
            *("trl", "tafs-grpo", *facts.card_tags, *facts.tags),
        ],
        widget=[{"text": prompt, "output": {"url": after}} for prompt, _, after in facts.pictures] or None,
    )
    name = facts.base_name
    base = f"[{name}](https://huggingface.co/{facts.base_model})" if facts.base_model else name
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        title=facts.model_name or (facts.repo_id or f"{name}-tafs-lora").split("/")[-1],
        datasets=", ".join(f"[{one}](https://huggingface.co/datasets/{one})" for one in facts.datasets),
        base=base,
        usage=usage_code(facts),
        comfyui=recipe(facts),
        beneath=", ".join(_beneath(adapter) for adapter in facts.frozen),
        fused=", ".join(f"`{name}`" for name in facts.base_fused),
        parts=", ".join(f"[{paper.name}]({paper.url})" for paper in facts.papers[1:]),
        bibtex="\n\n".join(paper.bibtex() for paper in facts.papers),
        method=_method(facts),
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        licence=_licence(facts, base),
        **_tables(facts),
    )


def _beneath(adapter: FrozenAdapter) -> str:
    weight = "a weight of its own for each layer" if adapter.weight is None else f"weight {adapter.weight:g}"
    return f"`{adapter.name}` at {weight} (digest {adapter.digest})"


def _method(facts: CardFacts) -> str:
    """Return how the adapter was trained, in a sentence."""
    scored = "the final images are scored and compared with those of the same prompt"
    if facts.scores_every_step:
        scored = "every step's clean images are scored and compared with those of the same prompt and step"
        scored += f", {facts.credited}"
    return f"the model's own {facts.num_steps}-step samples {facts.drawn}, {scored}, and {facts.moved}"


def _tables(facts: CardFacts) -> dict[str, str]:
    """Return the template's tables, each "" where there is nothing to show."""
    metrics = [(k, row if isinstance(row, Mapping) else {"value": row}) for k, row in facts.metrics.items()]
    columns = list(dict.fromkeys(column for _, row in metrics for column in row))
    pictures = [
        (prompt, *shown, f"![before]({before})" if before else "", f"![after]({after})")
        for (prompt, before, after), shown in zip(facts.pictures, _shown_sources(facts), strict=True)
    ]
    return {
        "levels": table(
            ["step", "passed", "seen by the model"],
            zip(range(1, facts.num_steps + 1), facts.levels_unshifted, facts.levels, strict=True),
        ),
        "pictures": table(["prompt", *["source"] * any(facts.sources), "before", "after"], pictures),
        "metrics": table(
            ["", *columns], [[name, *(row.get(column, "") for column in columns)] for name, row in metrics]
        ),
        "rewards": table(["reward", "weight"], facts.rewards.items()),
        "training": table(["setting", "value"], [(k, f"`{v}`") for k, v in facts.training.items() if v not in UNSET]),
        "curve": _curve(facts.reward_curve),
    }


def _shown_sources(facts: CardFacts) -> list[tuple[str, ...]]:
    """Return each row's cell of source pictures, of no row if there are none."""
    if not any(facts.sources):
        return [()] * len(facts.pictures)
    return [(" ".join(f"![source]({path})" for path in paths),) for paths in facts.sources]


def _curve(curve: Sequence[tuple[int, float]]) -> str:
    if curve and importlib.util.find_spec("matplotlib"):
        return f"![mean reward by epoch]({CURVE_FILE})"
    last = len(curve) - 1  # otherwise, at most 10 of the epochs, evenly spaced
    picked = sorted({round(i * last / 9) for i in range(10)}) if curve else []
    return table(["epoch", "reward"], [curve[i] for i in picked])


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
        write_whole(folder / CURVE_FILE, _plot(facts.reward_curve))
    settings = {name: None if value == "null" else value for name, value in facts.training.items()}
    write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=2))
    return write_whole(folder / "README.md", str(create_model_card(facts)))


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
