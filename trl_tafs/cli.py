"""The `trl-tafs` command: train, sample, and say what is installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl_tafs.prompt_sets import load_prompts

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
    """The script's arguments and a `TAFSGRPOConfig`: from the command line, else YAML, else a preset, else defaults."""
    from trl import TrlParser

    from trl_tafs.config import TAFSGRPOConfig
    from trl_tafs.presets import preset

    class Parser(TrlParser):
        def set_defaults_with_config(self, **values: Any) -> list[str]:
            """What a YAML file says; one value for a list is a list of it, where a string would become its letters."""
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
    """An error for a list option that is given twice: only the last would be kept, in silence."""
    for name in names:
        if sum(word == name or word.startswith(f"{name}=") for word in argv) > 1:
            raise ValueError(f"{name} is given more than once, and only the last would count; write {name} A=1 B=0.5")


def _preset_name(argv: list[str]) -> str | None:
    """The preset asked for on the command line or, without one there, in the YAML file."""
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(argv)
    if known.preset is None and known.config and Path(known.config).is_file():
        return (yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {}).get("preset")
    return known.preset


def quantization_config(name: str | None, components: Sequence[str]) -> Any:
    """Diffusers' configuration of `quantization`; None for None."""
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
    """The base model as a TAFS pipeline, its weights in the dtype of `mixed_precision`, or of that name."""
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
        torch_dtype=dtypes,
        quantization_config=quantization_config(arguments.quantization, arguments.quantized_components),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(argv: Sequence[str]) -> Callable[[], None]:
    """Train an adapter; all fields of the script's arguments and of `TAFSGRPOConfig` are options, or keys in YAML."""
    from trl_tafs import TAFSGRPOTrainer

    arguments, config = parse_arguments(argv, prog="trl-tafs train")
    if arguments.prompts is None:
        raise ValueError("--prompts is needed: a .txt, .jsonl, .json or .csv file, or a dataset on the Hub")
    prompts = load_prompts(arguments.prompts)
    rewards, eval_rewards = load_rewards(arguments)
    trainer = TAFSGRPOTrainer(
        config,
        rewards,
        prompts,
        load_pipeline(arguments, config.mixed_precision),
        eval_prompts=load_prompts(arguments.eval_prompts) if arguments.eval_prompts else None,
        eval_reward_function=eval_rewards,
    )
    return trainer.train


def load_rewards(arguments: ScriptArguments) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rewards of `--reward` and those of `--eval_reward`, None without, made with the options that are theirs."""
    from trl_tafs.config import decode_dict
    from trl_tafs.rewards.scoring import parse_rewards, reward_label

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


def sample(argv: Sequence[str]) -> Callable[[], None]:
    """Draw images with an adapter, by the sampler that it was trained for."""
    parser = argparse.ArgumentParser(prog="trl-tafs sample", description=sample.__doc__)
    parser.add_argument("adapter", help="folder or repository of the adapter; `none` for the base model")
    add_model_options(parser, "its base model")
    parser.add_argument("--model_cpu_offload", action="store_true", help="each model is on the GPU only while it works")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts, an image each")
    parser.add_argument("--output", default="image.png", help="PNG; several images side by side (default: image.png)")
    parser.add_argument("--num_steps", type=int, default=4, help="steps (default: 4)")
    parser.add_argument("--sampler", choices=["annealed", "ode"], default="annealed")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, off)")
    add_prompt_options(parser)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(list(argv))
    quantization_config(options.quantization, options.quantized_components)
    check_negative_prompt(options)
    return partial(_sample, options)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """What a prompt goes with, as in training."""
    parser.add_argument("--embedded_guidance_scale", type=float, help="of a distilled model (default: the pipeline's)")
    parser.add_argument("--negative_prompt", help="with guidance (default: the empty one)")
    parser.add_argument("--max_sequence_length", type=int, help="tokens of a prompt (default: the pipeline's)")


def check_negative_prompt(options: argparse.Namespace) -> None:
    """An error for a negative prompt without guidance, which would have no effect."""
    if options.negative_prompt and options.guidance_scale <= 1.0:
        raise ValueError(
            f"--negative_prompt is {options.negative_prompt!r}, and without guidance it has no effect; give "
            "--guidance_scale above 1, or leave it out"
        )


def add_model_options(parser: argparse.ArgumentParser, what: str) -> None:
    """How a base model is loaded, as for training."""
    parser.add_argument("--pretrained_model", required=True, help=what)
    parser.add_argument("--pretrained_revision", help="branch, tag or commit of the base model")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--quantization", help="parts of the base in 4 bit (nf4) or 8 bit (int8), as it was trained")
    parser.add_argument("--quantized_components", nargs="+", default=["transformer"])


def _sample(options: argparse.Namespace) -> None:
    import torch

    from trl_tafs.hub import applied
    from trl_tafs.metrics import save_png, tensor_to_image

    pipeline = load_pipeline(options, options.dtype)
    with applied(pipeline, None if options.adapter == "none" else options.adapter):
        if options.model_cpu_offload:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        images = _draw(pipeline, options)
    save_png(tensor_to_image(torch.cat(list(images.cpu()), dim=-1)), options.output)
    print(f"{len(images)} image{'s' if len(images) > 1 else ''} in {options.output}")


def _draw(pipeline: Any, options: argparse.Namespace) -> Any:
    """(B, 3, H, W), an image a prompt."""
    import torch

    default = pipeline.default_size()
    call = pipeline.call_arguments(
        options.num_steps, options.guidance_scale, options.negative_prompt, options.embedded_guidance_scale
    )
    if options.sampler == "ode":
        pipeline.scheduler = pipeline.euler_scheduler()  # its own may stretch the levels, or be another solver
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(options.prompt)
    return pipeline(
        prompt=options.prompt,
        height=options.height or default[0],
        width=options.width or default[1],
        generator=torch.Generator().manual_seed(options.seed),
        annealed=options.sampler == "annealed",
        max_sequence_length=options.max_sequence_length or pipeline.default_max_sequence_length(),
        output_type="pt",
        **call,
    ).images


EVALUATION_OPTIONS = {"geneval": {"graded": False}, "clip_score": {"scale": 100.0}}  # as the papers' tables have them


def evaluate(argv: Sequence[str]) -> Callable[[], None]:
    """Compare adapters and their base on a prompt set by any rewards: tables, grids, plots."""
    options = evaluation_parser().parse_args(list(argv))
    check_repeated(argv, ("--reward", "--prompts", "--num_steps", "--sampler", "--size"))
    local = [name for name in options.adapters if Path(name).exists()]
    if options.push and local:
        raise ValueError(f"--push is for adapters on the Hub, and {', '.join(local)} is local; push it first")
    check_negative_prompt(options)
    arguments = _evaluation_arguments(options)
    return partial(_evaluate, options, arguments)


def evaluation_parser() -> argparse.ArgumentParser:
    """The options of `trl-tafs evaluate`."""
    parser = argparse.ArgumentParser(prog="trl-tafs evaluate", description=evaluate.__doc__)
    parser.add_argument("adapters", nargs="+", help="folders or repositories of adapters; `none` for the base model")
    add_model_options(parser, "their base model")
    parser.add_argument("--offload_text_encoders", action="store_true", help="on the GPU only while they encode")
    parser.add_argument("--prompts", required=True, help="as for training, or a name of trl_tafs.prompt_sets")
    parser.add_argument("--reward", nargs="+", required=True, help="NAME ..., as for training")
    parser.add_argument("--reward_options", default="{}", help="of named rewards, as JSON")
    parser.add_argument("--output_dir", default="evaluation", help="what is there already is not done again")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[4])
    parser.add_argument("--sampler", nargs="+", default=["annealed"], help="annealed, ode")
    parser.add_argument(
        "--size", nargs="+", help="HEIGHTxWIDTH ...; by default 512x512, or the model's own where smaller"
    )
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    add_prompt_options(parser)
    parser.add_argument("--max_prompts", type=int, help="only the first so many")
    parser.add_argument("--images_per_prompt", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step_rewards", action="store_true", help="score every step's clean estimate (Table 7)")
    parser.add_argument("--push", action="store_true", help="add the results to the cards of the adapters on the Hub")
    return parser


def _evaluation_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `trl_tafs.evaluate` is given beside the models."""
    from trl_tafs.config import decode_dict
    from trl_tafs.rewards.scoring import parse_rewards

    given = decode_dict("reward_options", options.reward_options)
    named = {item.partition("=")[0] for item in options.reward}  # those of the package go by their whole name
    defaults = {name: value for name, value in EVALUATION_OPTIONS.items() if name in named}
    chosen = {name: defaults.get(name, {}) | given.get(name, {}) for name in defaults.keys() | given.keys()}
    prompts = load_prompts(options.prompts)
    if options.max_prompts is not None:
        prompts = [prompts[i] for i in range(min(options.max_prompts, len(prompts)))]
    return {
        "prompts": prompts,
        "rewards": parse_rewards(options.reward, chosen),
        "output_dir": options.output_dir,
        "num_steps": options.num_steps,
        "samplers": options.sampler,
        "sizes": [_size(text) for text in options.size] if options.size else None,
        "guidance_scale": options.guidance_scale,
        "embedded_guidance_scale": options.embedded_guidance_scale,
        "negative_prompt": options.negative_prompt,
        "max_sequence_length": options.max_sequence_length,
        "images_per_prompt": options.images_per_prompt,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "step_rewards": options.step_rewards,
        "offload_text_encoders": options.offload_text_encoders,
        "reward_options": chosen,
    }


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise ValueError(f"--size {text!r} isn't HEIGHTxWIDTH, such as 512x512")
    return int(height), int(width)


def _evaluate(options: argparse.Namespace, arguments: dict[str, Any]) -> None:
    from accelerate import PartialState

    from trl_tafs import evaluate as compare
    from trl_tafs.tables import markdown, push

    pipeline = load_pipeline(options, options.dtype)
    models = {
        "base" if name == "none" else name: (pipeline, None if name == "none" else name) for name in options.adapters
    }
    results = compare(models, **arguments)
    if not PartialState().is_main_process:
        return
    print(markdown(results))
    for name in options.adapters if options.push else ():
        if name != "none":
            print(push(results, name, name, Path(options.prompts).name))


def serve_reward(argv: Sequence[str]) -> Callable[[], None]:
    """Serve a reward over HTTP, for trainers in other processes and on other machines."""
    from trl_tafs.config import decode_dict
    from trl_tafs.rewards.scoring import load_reward, reward_label
    from trl_tafs.rewards.server import SECRET, check_exposure, serve

    options = serving_parser().parse_args(list(argv))
    check_exposure(options.host, os.environ.get(SECRET))
    reward = load_reward(options.name, decode_dict("--options", options.options))
    limits = {"max_bytes": options.max_bytes, "max_images": options.max_images}
    return partial(serve, reward_label(options.name), reward, options.host, options.port, **limits)


def serving_parser() -> argparse.ArgumentParser:
    """The options of `trl-tafs serve-reward`."""
    from trl_tafs.rewards.server import MAX_BYTES, MAX_IMAGES, SECRET

    parser = argparse.ArgumentParser(prog="trl-tafs serve-reward", description=serve_reward.__doc__)
    parser.add_argument("name", help="a name of trl_tafs.rewards.REWARDS, module:name or file.py:name")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help=f"any other than loopback needs {SECRET} set")
    parser.add_argument("--options", default="{}", help="of the reward, as JSON")
    parser.add_argument("--max_bytes", type=int, default=MAX_BYTES, help="of one request")
    parser.add_argument("--max_images", type=int, default=MAX_IMAGES, help="of one request")
    return parser


def env(argv: Sequence[str]) -> Callable[[], None]:
    """Versions and devices, to paste into an issue."""
    return _env


def _env() -> None:
    import platform

    import torch

    from trl_tafs.card import library_versions

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, version in library_versions().items():
        print(f"{name} {version}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) if devices else 'CPU only'}")


COMMANDS = {"train": train, "sample": sample, "evaluate": evaluate, "serve-reward": serve_reward, "env": env}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `trl-tafs`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        print("usage: trl-tafs {" + ",".join(COMMANDS) + "} [options]; trl-tafs COMMAND --help")
        for name, command in COMMANDS.items():
            print(f"  {name:13} {(command.__doc__ or '').splitlines()[0]}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from trl_tafs.checkpoint import CheckpointError
    from trl_tafs.hub import PushError
    from trl_tafs.rewards.scoring import RewardError

    refused: tuple[type[Exception], ...] = (RewardError, CheckpointError, PushError)
    try:
        try:
            work = COMMANDS[argv[0]](argv[1:])
        except (ValueError, OSError) as error:  # while setting up: what was asked for can't be
            print(f"trl-tafs {argv[0]}: {error}", file=sys.stderr)
            return 1
        work()  # errors that aren't ours are shown whole
    except refused as error:
        print(f"trl-tafs {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
