"""Write the recipes: a configuration for each model and card, with the memory that the planner counts for it.

    python examples/configs/make_recipes.py                 # all of them; a quarter of an hour of one core
    python examples/configs/make_recipes.py sana_24gb       # one
    python examples/configs/make_recipes.py --missing       # whether what isn't shipped fits by now

What to learn and how to judge it is the same in all of them (`LEARN`, `JUDGE`). Batches and what saves memory are
searched: the first of `WAYS` whose planned peak fits the card. Nothing is downloaded (recipe_models.py).
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import recipe_models
import torch
import yaml

from trl_tafs.cli.arguments import parse_arguments, pipeline_class
from trl_tafs.cli.plan import QUANTIZED_BYTES, planned_rewards
from trl_tafs.pipelines.skeleton import load_skeleton
from trl_tafs.training.advice import make_plan
from trl_tafs.training.memory import MemoryPlan
from trl_tafs.training.plan import EpochPlan, plan_epoch
from trl_tafs.training.simulation import Simulation

FOLDER = Path(__file__).resolve().parent
GIB = 2**30
CARDS = {"24gb": (23.5, 1), "80gb": (79.0, 1), "8x80gb": (79.0, 8)}  # GiB that are there to be used, and how many cards
IMAGES = {1: 96, 8: 48}  # a process's, an epoch
GROUP = {1: 24, 8: 48}  # images of a prompt: Flow-GRPO's, and the paper's
UPDATES = {1: 4, 8: 2}  # optimizer steps an epoch: docs/learning.md, "Several optimizer steps an epoch"
BF16 = {"dtype": "bfloat16"}

LEARN = {
    "prompts": "flow_grpo/pickapic_train",
    "reward": ["pickscore=1.0", "hps_v2=1.0", "clip_score=1.0"],
    "multi_objective_aggregation": "normalize_then_sum",
}
HELD_OUT = ("image_reward", "aesthetic")
JUDGE = {
    "eval_prompts": "examples/configs/held_out.txt",
    "eval_reward": [f"{name}=1.0" for name in HELD_OUT],
    "eval_freq": 20,
    "eval_num_steps": [4],
    "eval_samplers": ["annealed"],
    "eval_images_per_prompt": 2,
    "metric_for_best_model": "eval/annealed_4/image_reward",
    "early_stopping_patience": 10,
}
PAPER = {
    "preset": "paper",
    "multi_objective_aggregation": "normalize_then_sum",
}
OPTIMIZE = {"train_learning_rate": 3.0e-4, "train_use_ema": True, "train_ema_decay": 0.9}
SHORT = {
    "train_gradient_checkpointing": "checkpointing",
    "offload_text_encoders": "text encoders on the CPU",
    "model_cpu_offload": "parts take turns on the card",
}
OFFLOADS = (
    {},
    {"offload_text_encoders": True},
    {"model_cpu_offload": True},
)


class Plain(yaml.SafeDumper):
    """Without anchors, where two rewards have the same options."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


@dataclass(frozen=True)
class Recipe:
    """A model on a card."""

    title: str
    model: str  # of recipe_models.MODELS
    card: str  # of CARDS
    size: int = 512
    own: dict[str, Any] = field(default_factory=dict)  # options of this model
    learn: dict[str, Any] = field(default_factory=lambda: LEARN)
    fsdp2: bool = False
    notes: str = ""  # another sentence of the header


def _each(name: str, title: str, model: str, cards: str, **options: Any) -> dict[str, Recipe]:
    return {f"{name}_{card}": Recipe(title, model, card, **options) for card in cards.split()}


NF4 = {"quantization": "nf4"}
GUIDED = {"sample_embedded_guidance_scale": 3.5}
LLAMA = {"pipeline_class": "examples/hidream_llama.py:HiDreamWithLlama"}
PAPER_SD35 = PAPER | {
    "prompts": "flow_grpo/geneval_train",
    "reward": ["geneval=1.0", "pickscore=1.0", "clip_score=1.0", "hps_v2=1.0"],
}
PAPER_FLUX = PAPER | {"prompts": "flow_grpo/pickapic_train", "reward": ["pickscore=1.0", "clip_score=1.0"]}
AS_THE_PAPER = (
    "The paper's objective, prompts and rewards, where it says which; it gives no weights of the rewards. "
    "Its Eq. 10 learns slowly where the latent space is large (docs/learning.md)."
)
RECIPES: dict[str, Recipe] = {
    **_each("sd35_medium", "SD3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "24gb 80gb 8x80gb"),
    **_each("sd35_large", "SD3.5-large", "stabilityai/stable-diffusion-3.5-large", "24gb 80gb 8x80gb"),
    "flux1_dev_24gb": Recipe(
        "FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        "24gb",
        own=GUIDED | NF4 | {"quantized_components": ["transformer", "text_encoder_2"]},
    ),
    **_each("flux1_dev", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "80gb 8x80gb", own=GUIDED),
    **_each("flux2_klein", "FLUX.2-klein, the base of 4B", "black-forest-labs/FLUX.2-klein-base-4B", "24gb 80gb"),
    "flux2_dev_80gb": Recipe(
        "FLUX.2-dev",
        "black-forest-labs/FLUX.2-dev",
        "80gb",
        own=NF4 | {"quantized_components": ["transformer", "text_encoder"]},
    ),
    "flux2_dev_8x80gb": Recipe("FLUX.2-dev", "black-forest-labs/FLUX.2-dev", "8x80gb", fsdp2=True),
    "qwen_image_24gb": Recipe(
        "Qwen-Image",
        "Qwen/Qwen-Image",
        "24gb",
        own=NF4 | {"quantized_components": ["transformer", "text_encoder"], "max_sequence_length": 256},
    ),
    **_each("qwen_image", "Qwen-Image", "Qwen/Qwen-Image", "80gb 8x80gb", own={"max_sequence_length": 256}),
    **_each("z_image", "Z-Image", "Tongyi-MAI/Z-Image", "24gb 80gb"),
    **_each(
        "hidream",
        "HiDream-I1-Full",
        "HiDream-ai/HiDream-I1-Full",
        "80gb 8x80gb",
        own=LLAMA,
        size=1024,
        notes="HiDream draws at 1024 px only.",
    ),
    **_each("sana", "Sana 1.5", "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "24gb 80gb"),
    "sana_sprint_24gb": Recipe(
        "SanaSprint",
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        "24gb",
        own={"preset": "tafs_dm"},
        notes="It is few-step already: distribution matching beside the reward holds it to what it draws.",
    ),
    **_each("lumina2", "Lumina-Image 2.0", "Alpha-VLLM/Lumina-Image-2.0", "24gb"),
    **_each("chroma", "Chroma1-HD", "lodestones/Chroma1-HD", "80gb"),
    **_each("cogview4", "CogView4", "zai-org/CogView4-6B", "80gb"),
    **_each("aura_flow", "AuraFlow 0.3", "fal/AuraFlow-v0.3", "80gb"),
    **_each("ovis_image", "Ovis-Image", "AIDC-AI/Ovis-Image-7B", "80gb"),
    **_each("longcat_image", "LongCat-Image", "meituan-longcat/LongCat-Image", "80gb"),
    "sd35_medium_paper": Recipe(
        "SD3.5-medium as the paper trains it",
        "stabilityai/stable-diffusion-3.5-medium",
        "8x80gb",
        learn=PAPER_SD35,
        notes=AS_THE_PAPER,
    ),
    "flux1_dev_paper": Recipe(
        "FLUX.1-dev as the paper trains it",
        "black-forest-labs/FLUX.1-dev",
        "8x80gb",
        own=GUIDED,
        learn=PAPER_FLUX,
        notes=AS_THE_PAPER,
    ),
}
NOT_SHIPPED = {  # looked for, and no way fits
    "FLUX.1-dev on 24 GB without quantization": Recipe("", "black-forest-labs/FLUX.1-dev", "24gb", own=GUIDED),
    "FLUX.2-dev on one card of 80 GB without quantization": Recipe("", "black-forest-labs/FLUX.2-dev", "80gb"),
    "FLUX.2-dev on 24 GB, in 4 bit": Recipe(
        "",
        "black-forest-labs/FLUX.2-dev",
        "24gb",
        own=NF4 | {"quantized_components": ["transformer", "text_encoder"]},
    ),
    "Qwen-Image on 24 GB without quantization": Recipe("", "Qwen/Qwen-Image", "24gb"),
    "HiDream-I1 on 24 GB, in 4 bit": Recipe(
        "",
        "HiDream-ai/HiDream-I1-Full",
        "24gb",
        own=LLAMA | NF4 | {"quantized_components": ["transformer", "text_encoder_3", "text_encoder_4"]},
        size=1024,
    ),
}


# The search ---------------------------------------------------------------------------------------------------


def ways(recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of settings, the fastest first; in a list the one that holds most first.

    Eight images at once keep a card busy, four nearly do. Checkpointing costs a quarter of an update, what is moved to
    the CPU a few seconds an epoch.
    """
    rewards = [item.partition("=")[0] for item in recipe.learn["reward"]]
    for batch, checkpointing in ((8, False), (4, False), (8, True), (4, True), (2, True), (1, True)):
        found = []
        for offload in OFFLOADS:
            if "model_cpu_offload" in offload and (recipe.fsdp2 or "quantization" in recipe.own):
                continue
            if "offload_text_encoders" in offload and "quantization" in recipe.own:
                continue  # quantized weights stay where they are
            for away in ({}, {"offload": True}):
                options = dict.fromkeys(rewards, BF16 | away) | {name: {"offload": True} for name in HELD_OUT}
                checkpointed = {"train_gradient_checkpointing": True} if checkpointing else {}
                decoded = {"decode_batch_size": 2} if batch > 2 else {}
                found.append({"batch": batch, **checkpointed, **offload, **decoded, "reward_options": options})
        yield found


def settings(recipe: Recipe, name: str, way: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all options of a recipe, by what they are for."""
    processes = CARDS[recipe.card][1]
    batch, rest = way["batch"], {key: value for key, value in way.items() if key not in ("batch", "reward_options")}
    preset = {key: value for key, value in (recipe.own | recipe.learn).items() if key == "preset"}
    own = {key: value for key, value in recipe.own.items() if key != "preset"}
    learn = {key: value for key, value in recipe.learn.items() if key != "preset"}
    return {
        "The model.": {"pretrained_model": recipe.model, **own, "height": recipe.size, "width": recipe.size},
        "What it learns: several rewards, since one alone is the easiest to hack. Each is normalised by itself.": {
            **learn,
            "reward_options": way["reward_options"],
        },
        "How it is judged: held-out prompts and rewards; the best adapter by them is kept.": JUDGE,
        "The method: four annealed steps, and the lowest rate that docs/learning.md has measured, the paper's own.": {
            **preset,
            "num_epochs": 1500 if processes > 1 else 600,
            "sample_num_steps": 4,
            "num_generations": GROUP[processes],
            **({} if recipe.learn.get("preset") == "paper" else {"train_updates_per_epoch": UPDATES[processes]}),
            **OPTIMIZE,
            "lora_rank": 32,
            "lora_alpha": 64,
        },
        "Batches, and what they need. As many rows in an update as in a rollout, so that bfloat16 rounds both alike.": {
            "mixed_precision": "bf16",
            "sample_batch_size": batch,
            "sample_num_batches_per_epoch": IMAGES[processes] // batch,
            "train_batch_size": batch,
            **rest,
        },
        "Where it is written.": {"logdir": "runs", "run_name": name.replace("_", "-")},
    }


@cache
def simulation(model: str, size: int, loader: str | None) -> Simulation:
    """Return a model of that size without weights, from its architecture alone."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = recipe_models.write(model, Path(folder))
        return Simulation(load_skeleton(source, pipeline_class(loader), dtype=torch.bfloat16), size, size)


def parsed(text: str) -> tuple[Any, Any]:
    """Return the arguments and the configuration of a recipe's text."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return parse_arguments(["--config", str(file)])


def planned(recipe: Recipe, text: str) -> tuple[MemoryPlan, EpochPlan]:
    """Return the plan of a recipe's text on its cards."""
    arguments, config = parsed(text)
    rate = QUANTIZED_BYTES.get(arguments.quantization or "")
    quantized = {} if rate is None else dict.fromkeys(arguments.quantized_components, rate)
    epoch = plan_epoch(config, CARDS[recipe.card][1])
    made = make_plan(
        simulation(recipe.model, recipe.size, recipe.own.get("pipeline_class")),
        config,
        epoch,
        rewards=planned_rewards(arguments),
        quantized=quantized,
        sharded=recipe.fsdp2,
    )
    return made, epoch


def options_text(recipe: Recipe, name: str, way: dict[str, Any]) -> str:
    """Return a recipe's options as YAML, a comment above each part."""
    parts = settings(recipe, name, way).items()
    return (
        "".join(f"# {why}\n{yaml.dump(options, Dumper=Plain, sort_keys=False)}\n" for why, options in parts).rstrip()
        + "\n"
    )


def header(recipe: Recipe, name: str, made: MemoryPlan, epoch: EpochPlan) -> str:
    """Return what stands above a recipe's options."""
    capacity, processes = CARDS[recipe.card]
    where = f"{processes} cards" if processes > 1 else "one card"
    size, path = recipe.card.rpartition("x")[2].removesuffix("gb"), f"examples/configs/{name}.yaml"
    launch = f"trl-tafs train --config {path}"
    if processes > 1:
        layout = "fsdp2" if recipe.fsdp2 else "eight_gpus"
        launch = f"accelerate launch --config_file examples/accelerate/{layout}.yaml examples/train.py --config {path}"
    phases = ", ".join(f"{phase} {made.peak(phase) / GIB:.1f}" for phase in made.phases)
    lines = [
        f"{recipe.title} ({recipe_models.MODELS[recipe.model]['billions']}B weights) on {where} of {size} GB.",
        *([recipe.notes] if recipe.notes else []),
        f"An epoch: {epoch.line(1)}.",
        f"Planned memory of a card, GiB: {phases}; peak {made.peak() / GIB:.1f} of {capacity}.",
        f"Planned memory of a process on the host: {made.host / GIB:.1f} GiB.",
        f"    {launch}",
        "Written by examples/configs/make_recipes.py. Planned, not run at this size by us.",
    ]
    return "".join(f"# {line}\n" for line in lines) + "\n"


def search(recipe: Recipe, name: str) -> str | None:
    """Return the text of the first way that fits; None if none does."""
    capacity = CARDS[recipe.card][0] * GIB
    for alike in ways(recipe):
        least = options_text(recipe, name, alike[-1])
        if planned(recipe, least)[0].peak() > capacity:
            continue
        for way in alike:
            text = options_text(recipe, name, way)
            made, epoch = planned(recipe, text)
            if made.peak() <= capacity:
                return header(recipe, name, made, epoch) + text
    return None


def text_of(name: str) -> str:
    """Return the whole file of a recipe.

    Raises:
        ValueError: it fits its card in no way.
    """
    found = search(RECIPES[name], name)
    if found is None:
        raise ValueError(f"{name} fits {RECIPES[name].card} in no way; take it out of RECIPES")
    return found


def table() -> str:
    """Return the rows of docs/recipes.md, from the files."""
    rows = ["| Recipe | Images at once | Beside it | Peak, GiB | Host, GiB |", "|---|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        options = yaml.safe_load(text)
        peak, capacity = re.search(r"peak ([\d.]+) of ([\d.]+)\.$", text, re.MULTILINE).groups()
        host = re.search(r"host: ([\d.]+) GiB", text)[1]
        beside = [options["quantization"]] if "quantization" in options else []
        beside += ["FSDP2"] if recipe.fsdp2 else []
        beside += [short for option, short in SHORT.items() if options.get(option)]
        away = all(rules.get("offload") for rules in options["reward_options"].values())
        beside += ["rewards on the CPU between calls"] if away else []
        batch = options["sample_batch_size"]
        rows.append(f"| `{name}` | {batch} | {', '.join(beside)} | {peak} of {capacity} | {host} |")
    return "\n".join(rows) + "\n"


def write_table() -> None:
    """Put the table into docs/recipes.md, between its marks."""
    page = FOLDER.parents[1] / "docs" / "recipes.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- recipes -->\n")
    page.write_text(
        f"{before}<!-- recipes -->\n{table()}<!-- end -->{rest.partition('<!-- end -->')[2]}", encoding="utf-8"
    )


def main() -> None:
    """Write the recipes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--missing", action="store_true", help="say of what isn't shipped whether it fits")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in RECIPES]:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if options.missing:
        for title, recipe in NOT_SHIPPED.items():
            print(title, "fits" if search(recipe, "none") else "doesn't fit", flush=True)
        return
    for name in options.names or RECIPES:
        (FOLDER / f"{name}.yaml").write_text(text_of(name), encoding="utf-8")
        print(name, flush=True)
    write_table()


if __name__ == "__main__":
    main()
