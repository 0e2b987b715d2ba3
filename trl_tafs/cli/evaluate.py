"""`trl-tafs evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trl_tafs.cli.adapters import check_adapter
from trl_tafs.cli.arguments import (
    add_model_options,
    add_prompt_options,
    check_drawing,
    load_pipeline,
)
from trl_tafs.cli.parsing import OneLineParser, check_numbers
from trl_tafs.output.writable import check_writable
from trl_tafs.prompts.sets import load_prompts


def evaluate(argv: Sequence[str]) -> Callable[[], None]:
    """Compare adapters and their base model on a prompt set, by any rewards: tables, grids, plots."""
    from trl_tafs.hub.push import prepare_repo

    options = evaluation_parser().parse_args(list(argv))
    _check_options(options)
    check_drawing(options)
    for name in options.adapters:
        check_adapter(name)
    arguments = _evaluation_arguments(options)
    check_writable(options.output_dir, "--output_dir")
    for name in options.adapters if options.push else ():
        if name != "none":
            prepare_repo(name)
    return partial(_evaluate, options, arguments, load_pipeline(options, options.dtype))


def _check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that can't work, whatever is evaluated."""
    numbers = {"max_prompts": 1, "images_per_prompt": 1, "batch_size": 1}
    check_numbers(options, **numbers)
    if len(set(options.adapters)) < len(options.adapters):
        raise ValueError(f"an adapter is named twice: {', '.join(options.adapters)}")
    local = [name for name in options.adapters if Path(name).exists()]
    if options.push and local:
        raise ValueError(f"--push is for adapters on the Hub, and {', '.join(local)} is local; push it first")


def evaluation_parser() -> OneLineParser:
    """Return the parser of `trl-tafs evaluate`."""
    parser = OneLineParser(prog="trl-tafs evaluate", description=evaluate.__doc__)
    parser.add_argument("adapters", nargs="+", help="folders or repositories of adapters; `none` for the base model")
    add_model_options(parser, "their base model")
    parser.add_argument("--offload_text_encoders", action="store_true", help="on the GPU only while they encode")
    parser.add_argument("--prompts", required=True, help="as for training, or a name of trl_tafs.prompts.sets")
    parser.add_argument("--reward", nargs="+", required=True, help="NAME ..., as for training")
    parser.add_argument("--reward_options", default="{}", help="of named rewards, as JSON")
    parser.add_argument("--output_dir", default="evaluation", help="what is there already is not done again")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[4])
    parser.add_argument("--sampler", nargs="+", choices=["annealed", "ode"], default=["annealed"])
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
    """Return what `trl_tafs.evaluate` is given beside the models."""
    from trl_tafs.options import decode_dict
    from trl_tafs.rewards.loading import evaluation_options, parse_rewards, reward_label, split_weight

    given = decode_dict("reward_options", options.reward_options)
    usual = {reward_label(item): evaluation_options(split_weight(item)[0]) for item in options.reward}
    chosen = {name: usual.get(name, {}) | given.get(name, {}) for name in usual.keys() | given.keys()}
    chosen = {name: value for name, value in chosen.items() if value}
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
        "levels": options.levels,
        "reward_options": chosen,
    }


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {text!r} isn't HEIGHTxWIDTH, such as 512x512")
    return int(height), int(width)


def _evaluate(options: argparse.Namespace, arguments: dict[str, Any], pipeline: Any) -> None:
    from accelerate import PartialState

    from trl_tafs import evaluate as compare
    from trl_tafs.evaluation.tables import markdown
    from trl_tafs.hub.results import push

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
