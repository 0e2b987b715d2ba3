"""The arguments that commands share, and what is loaded by them: modules, pipelines, rewards, configurations."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl_tafs.cli.adapters import load_frozen, read_frozen
from trl_tafs.cli.parsing import OneLineParser, UsageError, check_numbers, read_options
from trl_tafs.options import Options
from trl_tafs.output.errors import did_you_mean, first_line, one_line, require, shown

SCALARS = (str, int, float)
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


def parse_arguments(argv: Sequence[str] | None = None, **parser_options: Any) -> tuple[ScriptArguments, Any]:
    """Return the script's arguments and a `TAFSGRPOConfig`.

    Each value is the command line's, else the file's, else the preset's, else the default. What is to be imported is
    imported first, so that its kernels, credit rules and objectives can be named.

    Raises:
        UsageError: something can't be understood.
        ValueError: something can't work.
    """
    from trl_tafs.config import TAFSGRPOConfig
    from trl_tafs.presets import preset

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = training_parser(**parser_options)
    first, _ = _first_parser().parse_known_args(argv)
    names = [option.name for kind in (ScriptArguments, TAFSGRPOConfig) for option in dataclasses.fields(kind)]
    values = read_options(first.config, [*names, "import", "env"]) if first.config else {}
    if "import" in values:
        values["imports"] = values.pop("import")
    _set_environment(values.pop("env", None))
    imports = values.get("imports") if first.imports is None else first.imports
    import_all([imports] if isinstance(imports, str) else imports)
    if (name := values.get("preset") if first.preset is None else first.preset) is not None:
        parser.set_defaults(**preset(name))
    parser.set_defaults_with_config(**values)
    found = vars(parser.parse_args(argv))
    return tuple(
        kind(**{option.name: found[option.name] for option in dataclasses.fields(kind)})
        for kind in (ScriptArguments, TAFSGRPOConfig)
    )


def training_parser(**parser_options: Any) -> Any:
    """Return the parser of `trl-tafs train`: each group of options under its title."""
    from trl import TrlParser

    from trl_tafs.config import TAFSGRPOConfig

    class Parser(OneLineParser, TrlParser):
        def set_defaults_with_config(self, **values: Any) -> list[str]:
            """Take over a file's values; one value for a list becomes a list, not a list of its letters."""
            lists = {action.dest: action.type for action in self._actions if action.nargs in ("+", "*")}
            for name in lists.keys() & values.keys():
                items = [values[name]] if isinstance(values[name], SCALARS) else values[name]
                if isinstance(items, list):  # YAML takes 1e-4 for text
                    items = [_converted(item, lists[name]) for item in items]
                values[name] = items
            return super().set_defaults_with_config(**values)

    groups = [ScriptArguments, *(group for group in reversed(TAFSGRPOConfig.__mro__) if "title" in vars(group))]
    titled = [type(group.__name__, (group,), {"_argument_group_name": group.title}) for group in groups]
    usage = "%(prog)s --prompts PROMPTS --reward NAME=WEIGHT ... [options]"
    parser = Parser(titled, **({"usage": usage} | parser_options))
    parser.add_argument("--config", help="a YAML file of these options, or the training_settings.json of a run")
    return parser


def _first_parser() -> OneLineParser:
    """Return a parser of what decides how the rest is read."""
    parser = OneLineParser(add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--preset")
    parser.add_argument("--import", "--imports", dest="imports", nargs="+")
    return parser


def _converted(item: Any, kind: Any) -> Any:
    try:
        return kind(item) if isinstance(item, str) else item
    except ValueError:  # the field's check names it
        return item


def _set_environment(variables: Any) -> None:
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise UsageError(f"env is {shown(variables)}; it must be a mapping of environment variables")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def import_all(names: Sequence[str] | None) -> None:
    """Run the files or modules of `--import`, which register parts of the user's own; raise ValueError if one can't."""
    from trl_tafs.rewards.loading import import_module_or_file

    for name in names or ():
        import_module_or_file(str(name), f"--import {name}")


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


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that an image is drawn with, as in training."""
    parser.add_argument("--embedded_guidance_scale", type=float, help="of a distilled model (default: the pipeline's)")
    parser.add_argument(
        "--levels",
        choices=["uniform", "scheduler"],  # levels.LEVELS, which would import torch
        default="uniform",
        help="of the steps, as sample_levels in training",
    )
    parser.add_argument("--negative_prompt", help="with guidance (default: the empty one)")
    parser.add_argument("--max_sequence_length", type=int, help="tokens of a prompt (default: the pipeline's)")


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
    import_all(options.imports)


def add_model_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that say which base model is loaded, and how, as in training."""
    parser.add_argument("--pretrained_model", required=True, help=what)
    parser.add_argument("--pretrained_revision", help="branch, tag or commit of the base model")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--quantization", help="parts of the base in 4 bit (nf4) or 8 bit (int8), as it was trained")
    parser.add_argument("--quantized_components", nargs="+", default=["transformer"])
    parser.add_argument("--import", dest="imports", nargs="+", help=IMPORT_HELP)
    parser.add_argument("--pipeline_class", help=PIPELINE_HELP)
    parser.add_argument("--frozen_adapters", nargs="+", help=FROZEN_HELP.replace("the trained one", "the adapter"))
