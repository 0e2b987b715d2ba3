"""The arguments that commands share, and what is loaded by them: modules, pipelines, rewards, configurations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl_tafs.cli.adapters import load_frozen, read_frozen
from trl_tafs.cli.command import CommandOptions, make_parser, parse
from trl_tafs.cli.parsing import check_numbers
from trl_tafs.options import Options, check_choice
from trl_tafs.output.errors import did_you_mean, first_line, one_line, require, shown

DTYPES = ("float32", "float16", "bfloat16")
SAMPLERS = ("annealed", "ode")
LEVELS = ("uniform", "scheduler")  # levels.LEVELS, which would import torch
QUANTIZATIONS = ("nf4", "int8")
IMPORT_HELP = (
    "Files or modules, run before anything else, that register kernels, credit rules, objectives or families of your "
    "own (docs/extending.md)."
)
FROZEN_HELP = (
    "LoRAs to lie frozen beneath the trained one, such as a turbo LoRA: folders or repositories, each with =WEIGHT "
    "where it isn't 1 (docs/adapters.md)."
)
PIPELINE_HELP = "A pipeline class of your own, file.py:Name or module:Name (docs/new_family.md)."


@dataclass
class ModelOptions(CommandOptions):
    """Which base model is loaded, and how, as in training."""

    title: ClassVar[str] = "Model"
    required: ClassVar[tuple[str, ...]] = ("pretrained_model",)

    pretrained_model: str = field(
        default="", metadata={"help": "The adapter's base model: a repository or a local folder."}
    )
    pretrained_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the weights.", "choices": DTYPES})
    quantization: str | None = field(
        default=None, metadata={"help": "Parts of the base in 4 bit (nf4) or 8 bit (int8), as it was trained."}
    )
    quantized_components: list[str] = field(
        default_factory=lambda: ["transformer"], metadata={"help": "The parts that `quantization` is for."}
    )
    imports: list[str] | None = field(default=None, metadata={"help": IMPORT_HELP, "aliases": ["--import"]})
    pipeline_class: str | None = field(default=None, metadata={"help": PIPELINE_HELP})
    frozen_adapters: list[str] | None = field(
        default=None, metadata={"help": FROZEN_HELP.replace("the trained one", "the adapter")}
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "dtype", DTYPES)


@dataclass
class PromptOptions(CommandOptions):
    """What an image is drawn with, as in training."""

    title: ClassVar[str] = "Guidance and prompts"

    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1: none."})
    embedded_guidance_scale: float | None = field(
        default=None, metadata={"help": "Of a distilled model; None: the pipeline's."}
    )
    levels: str = field(
        default="uniform", metadata={"help": "Of the steps, as sample_levels in training.", "choices": LEVELS}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "With guidance; None: the empty one."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt; None: the pipeline's."}
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "levels", LEVELS)


@dataclass
class ScriptArguments(Options):
    """What to train, on which prompts, for which rewards."""

    title: ClassVar[str] = "Script"

    pretrained_model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={"help": "Base model: a repository on the Hub or a local folder in diffusers' format."},
    )
    pretrained_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    quantization: str | None = field(
        default=None,
        metadata={"help": "Load parts of the base in 4 bit (nf4) or 8 bit (int8) by bitsandbytes, under the LoRA."},
    )
    quantized_components: list[str] = field(
        default_factory=lambda: ["transformer"],
        metadata={"help": "The parts that `quantization` is for, as the base's model_index.json names them."},
    )
    pipeline_class: str | None = field(default=None, metadata={"help": PIPELINE_HELP})
    frozen_adapters: list[str] | None = field(default=None, metadata={"help": FROZEN_HELP})
    imports: list[str] | None = field(
        default=None, metadata={"help": f"`--import`, in YAML `import`. {IMPORT_HELP}", "aliases": ["--import"]}
    )
    preset: str | None = field(
        default=None, metadata={"help": "Options of a named method, below those given: a name of trl_tafs.presets."}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Training prompts: a .txt file (one a line), a .jsonl, .json or .csv file with a `prompt` column "
            "(the others are handed to the rewards as metadata), a named set, geneval-style:N or geneval-style:N:SEED, "
            "or a dataset on the Hub (docs/evaluation.md)."
        },
    )
    eval_prompts: str | None = field(default=None, metadata={"help": "Held-out prompts, as `prompts`."})
    reward: list[str] = field(
        default_factory=lambda: ["clip_score=1.0"],
        metadata={
            "help": "Rewards with weights: NAME=WEIGHT ..., a name of trl_tafs.rewards.REWARDS, module:name, "
            "file.py:name, or an address, http://HOST:PORT."
        },
    )
    reward_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Options of rewards as JSON, such as \'{"hps_v2": {"version": "v2.0"}}\'; for `reward` and '
            "`eval_reward`. A served reward goes by HOST:PORT, one of your own by its name."
        },
    )
    eval_reward: list[str] | None = field(
        default=None, metadata={"help": "Held-out rewards for evaluation, as `reward`; by default the training ones."}
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_quantization(self.quantization)
        read_frozen(self.frozen_adapters)


# What `trl-tafs train --help` shows of some 150 options.
SHORT = (
    *("pretrained_model", "prompts", "reward", "preset", "eval_prompts", "eval_reward", "run_name", "logdir", "seed"),
    *("num_epochs", "resume_from", "mixed_precision", "log_with", "sample_num_steps", "sample_batch_size"),
    *("sample_num_batches_per_epoch", "num_generations", "height", "width", "offload_text_encoders", "objective"),
    *("train_batch_size", "train_learning_rate", "beta", "train_gradient_checkpointing", "lora_rank", "eval_freq"),
    *("metric_for_best_model", "picture_freq", "push_to_hub", "hub_model_id"),
)
USAGE = "%(prog)s --prompts PROMPTS --reward NAME=WEIGHT ... [options]"


def training_kinds() -> list[type]:
    """Return the groups of options of `trl-tafs train`, in their order."""
    from trl_tafs.config import TAFSGRPOConfig

    return [ScriptArguments, *(group for group in reversed(TAFSGRPOConfig.__mro__) if "title" in vars(group))]


def training_parser(more: Sequence[type] = (), **parser_options: Any) -> Any:
    """Return the parser of `trl-tafs train`: each group of options under its title, those of `more` first."""
    own = [option.name for kind in more for option in fields(kind)]
    return make_parser([*more, *training_kinds()], short=[*SHORT, *own], **({"usage": USAGE} | parser_options))


def parse_arguments(
    argv: Sequence[str] | None = None, more: Sequence[type] = (), **parser_options: Any
) -> tuple[Any, ...]:
    """Return the script's arguments, a `TAFSGRPOConfig`, and an object of each kind of `more`.

    Each value is the command line's, else the file's, else the preset's, else the default. What is to be imported is
    imported first, so that its kernels, credit rules and objectives can be named.

    Raises:
        UsageError: something can't be understood.
        ValueError: something can't work.
    """
    from trl_tafs.config import TAFSGRPOConfig
    from trl_tafs.presets import preset

    return parse(
        [ScriptArguments, TAFSGRPOConfig, *more],
        sys.argv[1:] if argv is None else argv,
        lambda name: {} if name is None else preset(name),
        parser=training_parser(more, **parser_options),
    )


def check_quantization(name: str | None) -> None:
    """Raise ValueError if there is no such quantization; None is none."""
    if name not in (None, *QUANTIZATIONS):
        known = did_you_mean(name, QUANTIZATIONS)
        raise ValueError(f"quantization is {shown(name)}; use {' or '.join(QUANTIZATIONS)}, or leave it out{known}")


def quantization_config(name: str | None, components: Sequence[str]) -> Any:
    """Return diffusers' configuration of `quantization`; None for None."""
    import torch
    from diffusers import PipelineQuantizationConfig

    check_quantization(name)
    if name is None:
        return None
    backend, options = {
        "nf4": (
            "bitsandbytes_4bit",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        ),
        "int8": ("bitsandbytes_8bit", {"load_in_8bit": True}),
    }[name]
    return PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=options, components_to_quantize=list(components)
    )


def load_pipeline(arguments: ScriptArguments | argparse.Namespace, precision: str) -> Any:
    """Load the base model as a TAFS pipeline, with the LoRAs that lie frozen on it.

    Args:
        arguments: that name the model, its revision, its quantization, a pipeline class of the user's own, the LoRAs.
        precision: of the weights: a value of `mixed_precision`, or a dtype's name.

    Raises:
        ValueError: it can't be loaded; says why.
        ImportError: bitsandbytes is missing.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    loader = pipeline_class(arguments.pipeline_class)
    if arguments.quantization is not None:
        # bitsandbytes loads to the current GPU, which is the first one on every process until this sets it
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        require("bitsandbytes", f"quantization={arguments.quantization}", "8bit")
    name = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(precision, precision)
    dtype = getattr(torch, name)
    dtypes = {"default": dtype, "vae": torch.float32} if dtype == torch.float16 else dtype  # VAEs overflow in float16
    try:
        pipeline = loader.from_pretrained(
            arguments.pretrained_model,
            revision=arguments.pretrained_revision,
            dtype=dtypes,
            quantization_config=quantization_config(arguments.quantization, arguments.quantized_components),
        )
    except Exception as error:  # files, the network, and what libraries make of what they find there
        told = one_line(error) if isinstance(error, (ValueError, OSError)) else first_line(error)
        raise ValueError(f"the model {arguments.pretrained_model} can't be loaded: {told}") from error
    pipeline.set_progress_bar_config(disable=True)
    load_frozen(pipeline, arguments.frozen_adapters)
    return pipeline


def pipeline_class(name: str | None) -> Any:
    """Return the class of `--pipeline_class`, file.py:Name or module:Name; `AutoTAFSPipeline` for None.

    Raises:
        ValueError: there is none, or it is no TAFS pipeline.
    """
    from diffusers import DiffusionPipeline

    from trl_tafs import AutoTAFSPipeline
    from trl_tafs.pipelines.base import TAFSPipelineMixin
    from trl_tafs.rewards.loading import find_object

    if name is None:
        return AutoTAFSPipeline
    found = find_object(name, f"--pipeline_class {name}")
    if not (isinstance(found, type) and issubclass(found, TAFSPipelineMixin) and issubclass(found, DiffusionPipeline)):
        raise ValueError(
            f"--pipeline_class {name} is {shown(found)}, no TAFS pipeline: a subclass of TAFSPipelineMixin and of a "
            "diffusers pipeline (docs/new_family.md)"
        )
    return found


def load_rewards(arguments: ScriptArguments) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Make the rewards of `--reward` and of `--eval_reward` (None if there are none), each with its own options."""
    from trl_tafs.options import decode_dict
    from trl_tafs.rewards.loading import parse_rewards, reward_label

    options = decode_dict("reward_options", arguments.reward_options)
    lists = [arguments.reward, arguments.eval_reward or []]
    labels = [{reward_label(item) for item in items} for items in lists]
    if not options.keys() <= labels[0] | labels[1]:
        names = ", ".join(sorted(labels[0] | labels[1]))
        raise ValueError(f"reward_options are for {', '.join(options)}; the rewards are {names}")
    training, held_out = (
        parse_rewards(items, {label: value for label, value in options.items() if label in own}) if items else None
        for items, own in zip(lists, labels, strict=True)
    )
    return training, held_out


def check_drawing(options: argparse.Namespace) -> None:
    """Raise ValueError for options of `sample` and `evaluate` that can't work, whatever the model."""
    check_numbers(options, num_steps=1, guidance_scale=0, embedded_guidance_scale=0, max_sequence_length=1, seed=0)
    check_quantization(options.quantization)
    read_frozen(options.frozen_adapters)
    if options.negative_prompt and options.guidance_scale <= 1.0:
        raise ValueError(
            f"--negative_prompt is {options.negative_prompt!r}, and without guidance it has no effect; give "
            "--guidance_scale above 1, or leave it out"
        )
