"""`trl-tafs evaluate`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trl_tafs.cli.adapters import check_adapter
from trl_tafs.cli.arguments import SAMPLERS, ModelOptions, PromptOptions, check_drawing, load_pipeline
from trl_tafs.cli.command import CommandOptions, make_parser, merged, parse
from trl_tafs.cli.parsing import UsageError, check_numbers
from trl_tafs.output.errors import did_you_mean, shown
from trl_tafs.output.writable import check_writable
from trl_tafs.prompts.sets import load_prompts


@dataclass
class EvaluationOptions(CommandOptions):
    """What is compared, on which prompts, by which rewards."""

    title: ClassVar[str] = "Evaluation"
    positional: ClassVar[dict[str, str | None]] = {"adapters": "*"}
    required: ClassVar[tuple[str, ...]] = ("prompts", "reward")

    adapters: list[str] | None = field(
        default=None, metadata={"help": "Folders or repositories of adapters; `none` for the base model."}
    )
    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead, or beside them, NAME=ADAPTER ...: adapters by the names that tables have for them."
        },
    )
    prompts: str = field(default="", metadata={"help": "As for training, or a name of trl_tafs.prompts.sets."})
    reward: list[str] | None = field(default=None, metadata={"help": "NAME ..., as for training."})
    reward_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Of named rewards, as JSON."})
    output_dir: str = field(default="evaluation", metadata={"help": "What is there already is not done again."})
    num_steps: list[int] = field(default_factory=lambda: [4], metadata={"help": "Step counts."})
    sampler: list[str] = field(default_factory=lambda: ["annealed"], metadata={"help": "How.", "choices": SAMPLERS})
    size: list[str] | None = field(
        default=None, metadata={"help": "HEIGHTxWIDTH ...; None: 512x512, or the model's own where smaller."}
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Only the first so many."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt."})
    batch_size: int = field(default=8, metadata={"help": "Images drawn at once."})
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    step_rewards: bool = field(default=False, metadata={"help": "Score every step's clean estimate (Table 7)."})
    offload_text_encoders: bool = field(default=False, metadata={"help": "On the GPU only while they encode."})
    push: bool = field(default=False, metadata={"help": "Add the results to the cards of the adapters on the Hub."})

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        for name in self.sampler:
            if name not in SAMPLERS:
                raise ValueError(f"sampler is {shown(name)}; use {' or '.join(SAMPLERS)}{did_you_mean(name, SAMPLERS)}")


KINDS = (EvaluationOptions, ModelOptions, PromptOptions)
SHORT = ("models", "prompts", "reward", "output_dir", "num_steps", "size", "max_prompts", "images_per_prompt")
SHORT += ("batch_size", "seed", "pretrained_model", "guidance_scale", "sampler")


def evaluate(argv: Sequence[str]) -> Callable[[], None]:
    """Compare adapters and their base model on a prompt set, by any rewards: tables, grids, plots."""
    from trl_tafs.hub.push import prepare_repo

    options = Namespace(**merged(parse(KINDS, argv, parser=evaluation_parser())))
    named = named_models(options.adapters, options.models)
    _check_options(options, list(named.values()))
    check_drawing(options)
    for name in named.values():
        check_adapter(name)
    arguments = _evaluation_arguments(options)
    check_writable(options.output_dir, "--output_dir")
    for name in named.values() if options.push else ():
        if name != "none":
            prepare_repo(name)
    return partial(_evaluate, options, named, arguments, load_pipeline(options, options.dtype))


def named_models(adapters: Sequence[str] | None, models: Sequence[str] | None) -> dict[str, str]:
    """Return the adapters by the names that tables have for them; `none` is called base.

    Raises:
        UsageError: there are none, or one isn't NAME=ADAPTER.
        ValueError: an adapter, or a name, is there twice.
    """
    given = list(adapters or ())
    if len(set(given)) < len(given):
        raise ValueError(f"an adapter is named twice: {', '.join(given)}")
    found = {"base" if name == "none" else name: name for name in given}
    for item in models or ():
        name, equals, adapter = item.partition("=")
        if not (name and equals and adapter):
            raise UsageError(f"--models has {item!r}; write NAME=ADAPTER, a folder, a repository or none")
        if name in found:
            raise ValueError(f"--models has the name {name!r} twice; give each adapter a name of its own")
        found[name] = adapter
    if not found:
        raise UsageError("nothing to evaluate: name adapters (`none` is the base model), or --models NAME=ADAPTER ...")
    return found


def _check_options(options: Namespace, adapters: Sequence[str]) -> None:
    """Raise ValueError for options that can't work, whatever is evaluated."""
    numbers = {"max_prompts": 1, "images_per_prompt": 1, "batch_size": 1}
    check_numbers(options, **numbers)
    local = [name for name in adapters if Path(name).exists()]
    if options.push and local:
        raise ValueError(f"--push is for adapters on the Hub, and {', '.join(local)} is local; push it first")


def evaluation_parser() -> Any:
    """Return the parser of `trl-tafs evaluate`."""
    usage = "%(prog)s ADAPTER ... --pretrained_model MODEL --prompts PROMPTS --reward NAME ... [options]"
    return make_parser(KINDS, short=SHORT, prog="trl-tafs evaluate", description=evaluate.__doc__, usage=usage)


def _evaluation_arguments(options: Namespace) -> dict[str, Any]:
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


def _evaluate(options: Namespace, named: dict[str, str], arguments: dict[str, Any], pipeline: Any) -> None:
    from accelerate import PartialState

    from trl_tafs import evaluate as compare
    from trl_tafs.evaluation.tables import markdown
    from trl_tafs.hub.results import push

    results = compare({k: (pipeline, None if name == "none" else name) for k, name in named.items()}, **arguments)
    if not PartialState().is_main_process:
        return
    print(markdown(results))
    for label, name in named.items() if options.push else ():
        if name != "none":
            print(push(results, label, name, Path(options.prompts).name))
