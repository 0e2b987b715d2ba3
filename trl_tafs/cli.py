"""The `trl-tafs` command: train, sample, and say what is installed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


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
            "(the others are handed to the rewards as metadata), or a dataset on the Hub."
        },
    )
    eval_prompts: str | None = field(default=None, metadata={"help": "Held-out prompts, as `prompts`."})
    reward: list[str] = field(
        default_factory=lambda: ["clip_score=1.0"],
        metadata={
            "help": "Rewards with weights: NAME=WEIGHT ..., a name of trl_tafs.rewards.REWARDS or module:function."
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

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser((ScriptArguments, TAFSGRPOConfig), **parser_options)
    name = _preset_name(argv)
    if name is not None:
        parser.set_defaults(**preset(name))
    return parser.parse_args_and_config(args=argv)


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


def load_prompts(source: str) -> Any:
    """Prompts of a file or of a dataset on the Hub, for `TAFSGRPOTrainer`.

    Raises:
        ValueError: there is no such file, or it holds no prompts.
    """
    path = Path(source)
    if path.suffix == ".txt":
        rows: list[Any] = [line.strip() for line in _read(path).splitlines() if line.strip()]
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in _read(path).splitlines() if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(_read(path))
    else:
        from datasets import load_dataset

        if path.suffix == ".csv":
            return load_dataset("csv", data_files=str(path), split="train")
        return load_dataset(source, split="train")
    if not rows:
        raise ValueError(f"{source} holds no prompts; write one a line")
    return rows


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no prompt file {path}")
    return path.read_text(encoding="utf-8")


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


def load_pipeline(arguments: ScriptArguments, mixed_precision: str) -> Any:
    """The base model as a TAFS pipeline, its weights in the dtype that it is trained in."""
    import torch

    from trl_tafs import AutoTAFSPipeline

    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
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
    from trl_tafs.rewards.scoring import parse_rewards

    arguments, config = parse_arguments(argv, prog="trl-tafs train")
    if arguments.prompts is None:
        raise ValueError("--prompts is needed: a .txt, .jsonl, .json or .csv file, or a dataset on the Hub")
    prompts = load_prompts(arguments.prompts)
    rewards = parse_rewards(arguments.reward)
    trainer = TAFSGRPOTrainer(
        config,
        rewards,
        prompts,
        load_pipeline(arguments, config.mixed_precision),
        eval_prompts=load_prompts(arguments.eval_prompts) if arguments.eval_prompts else None,
        eval_reward_function=parse_rewards(arguments.eval_reward) if arguments.eval_reward else None,
    )
    return trainer.train


def sample(argv: Sequence[str]) -> Callable[[], None]:
    """Draw images with an adapter, by the sampler that it was trained for."""
    parser = argparse.ArgumentParser(prog="trl-tafs sample", description=sample.__doc__)
    parser.add_argument("adapter", help="folder or repository of the adapter; `none` for the base model")
    parser.add_argument("--pretrained_model", required=True, help="its base model")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts, an image each")
    parser.add_argument("--output", default="image.png", help="PNG; several images side by side (default: image.png)")
    parser.add_argument("--num_steps", type=int, default=4, help="steps (default: 4)")
    parser.add_argument("--sampler", choices=["annealed", "ode"], default="annealed")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, off)")
    parser.add_argument("--embedded_guidance_scale", type=float, help="of a distilled model (default: the pipeline's)")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    options = parser.parse_args(list(argv))
    return partial(_sample, options)


def _sample(options: argparse.Namespace) -> None:
    import torch

    from trl_tafs import AutoTAFSPipeline
    from trl_tafs.metrics import save_png, tensor_to_image

    dtype = getattr(torch, options.dtype)
    pipeline = AutoTAFSPipeline.from_pretrained(options.pretrained_model, torch_dtype=dtype)
    if options.adapter != "none":
        pipeline.load_lora_weights(options.adapter)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    default = pipeline.default_size()
    call = pipeline.call_arguments(
        options.num_steps, options.guidance_scale, embedded_guidance_scale=options.embedded_guidance_scale
    )
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(options.prompt)
    images = pipeline(
        prompt=options.prompt,
        height=options.height or default[0],
        width=options.width or default[1],
        generator=torch.Generator().manual_seed(options.seed),
        annealed=options.sampler == "annealed",
        max_sequence_length=pipeline.default_max_sequence_length(),
        output_type="pt",
        **call,
    ).images
    save_png(tensor_to_image(torch.cat(list(images.cpu()), dim=-1)), options.output)
    print(f"{len(images)} image{'s' if len(images) > 1 else ''} in {options.output}")


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


COMMANDS = {"train": train, "sample": sample, "env": env}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `trl-tafs`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        print("usage: trl-tafs {" + ",".join(COMMANDS) + "} [options]; trl-tafs COMMAND --help")
        for name, command in COMMANDS.items():
            print(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}")
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
