"""The arguments that commands share, and what is loaded by them: pipelines, rewards, configurations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCALARS = (str, int, float)


@dataclass
class ScriptArguments:
    """What to train, on which prompts, for which rewards."""

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


def parse_arguments(argv: Sequence[str] | None = None, **parser_options: Any) -> tuple[ScriptArguments, Any]:
    """Return the script's arguments and a `TAFSGRPOConfig`.

    Each value is the command line's, else the YAML file's, else the preset's, else the default.
    """
    from trl import TrlParser

    from trl_tafs.config import TAFSGRPOConfig
    from trl_tafs.presets import preset

    class Parser(TrlParser):
        def set_defaults_with_config(self, **values: Any) -> list[str]:
            """Take over a YAML file's values; one value for a list becomes a list, not a list of its letters."""
            lists = {action.dest for action in self._actions if action.nargs in ("+", "*")}
            alone = {name: [value] for name, value in values.items() if name in lists and isinstance(value, SCALARS)}
            return super().set_defaults_with_config(**values | alone)

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser((ScriptArguments, TAFSGRPOConfig), **parser_options)
    check_repeated(argv, ("--reward", "--eval_reward"))
    name = _preset_name(argv)
    if name is not None:
        parser.set_defaults(**preset(name))
    return parser.parse_args_and_config(args=argv)


def check_repeated(argv: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError if a list option is given twice, of which only the last would count."""
    for name in names:
        if sum(word == name or word.startswith(f"{name}=") for word in argv) > 1:
            raise ValueError(f"{name} is given more than once, and only the last would count; write {name} A=1 B=0.5")


def _preset_name(argv: list[str]) -> str | None:
    """Return the preset that is asked for on the command line, or else in the YAML file."""
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(argv)
    if known.preset is None and known.config and Path(known.config).is_file():
        return (yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {}).get("preset")
    return known.preset


def quantization_config(name: str | None, components: Sequence[str]) -> Any:
    """Return diffusers' configuration of `quantization`; None for None."""
    import torch
    from diffusers import PipelineQuantizationConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    backends = {"nf4": ("bitsandbytes_4bit", nf4), "int8": ("bitsandbytes_8bit", {"load_in_8bit": True})}
    if name is None:
        return None
    if name not in backends:
        raise ValueError(f"quantization is {name!r}; use {' or '.join(backends)}, or leave it out")
    backend, options = backends[name]
    return PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=options, components_to_quantize=list(components)
    )


def load_pipeline(arguments: ScriptArguments | argparse.Namespace, precision: str) -> Any:
    """Load the base model as a TAFS pipeline.

    Args:
        arguments: that name the model, its revision and its quantization.
        precision: of the weights: a value of `mixed_precision`, or a dtype's name.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from trl_tafs import AutoTAFSPipeline

    if arguments.quantization is not None:
        # bitsandbytes loads to the current GPU, which is the first one on every process until this sets it
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    name = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(precision, precision)
    dtype = getattr(torch, name)
    dtypes = {"default": dtype, "vae": torch.float32} if dtype == torch.float16 else dtype  # VAEs overflow in float16
    pipeline = AutoTAFSPipeline.from_pretrained(
        arguments.pretrained_model,
        revision=arguments.pretrained_revision,
        dtype=dtypes,
        quantization_config=quantization_config(arguments.quantization, arguments.quantized_components),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    """Add the options that a prompt is encoded with, as in training."""
    parser.add_argument("--embedded_guidance_scale", type=float, help="of a distilled model (default: the pipeline's)")
    parser.add_argument("--negative_prompt", help="with guidance (default: the empty one)")
    parser.add_argument("--max_sequence_length", type=int, help="tokens of a prompt (default: the pipeline's)")


def check_negative_prompt(options: argparse.Namespace) -> None:
    """Raise ValueError if there is a negative prompt without guidance, which has no effect."""
    if options.negative_prompt and options.guidance_scale <= 1.0:
        raise ValueError(
            f"--negative_prompt is {options.negative_prompt!r}, and without guidance it has no effect; give "
            "--guidance_scale above 1, or leave it out"
        )


def add_model_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that say which base model is loaded, and how, as in training."""
    parser.add_argument("--pretrained_model", required=True, help=what)
    parser.add_argument("--pretrained_revision", help="branch, tag or commit of the base model")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--quantization", help="parts of the base in 4 bit (nf4) or 8 bit (int8), as it was trained")
    parser.add_argument("--quantized_components", nargs="+", default=["transformer"])
