"""`trl-tafs train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_tafs.cli.arguments import ScriptArguments, load_pipeline, load_rewards, parse_arguments
from trl_tafs.prompts.sets import load_prompts


def train(argv: Sequence[str]) -> Callable[[], None]:
    """Train an adapter; all fields of the script's arguments and of `TAFSGRPOConfig` are options, or keys in YAML."""
    trainer = make_trainer(*parse_arguments(argv, prog="trl-tafs train", description=train.__doc__))
    trainer.stopper.command = resume_command(argv)
    return trainer.train


def make_trainer(arguments: ScriptArguments, config: Any) -> Any:
    """Load what the arguments name, and make the trainer of it.

    Raises:
        ValueError, OSError, ImportError: something that was asked for can't be.
    """
    from trl_tafs import TAFSGRPOTrainer
    from trl_tafs.training.launch import check_launch

    check_launch(config)  # before a model is loaded
    if arguments.prompts is None:
        raise ValueError("--prompts is needed: a .txt, .jsonl, .json or .csv file, or a dataset on the Hub")
    prompts = load_prompts(arguments.prompts)
    if arguments.frozen_adapters and config.model_adapter_name is None:
        config.model_adapter_name = "default"  # a new one, above them
    rewards, eval_rewards = load_rewards(arguments)
    return TAFSGRPOTrainer(
        config,
        rewards,
        prompts,
        load_pipeline(arguments, config.mixed_precision),
        eval_prompts=load_prompts(arguments.eval_prompts) if arguments.eval_prompts else None,
        eval_reward_function=eval_rewards,
    )


def resume_command(argv: Sequence[str]) -> str:
    """Return the command line that resumes the run that this one began."""
    program = ["python", sys.argv[0]] if Path(sys.argv[0]).name == "train.py" else ["trl-tafs", "train"]
    kept, words = [], iter(argv)
    for word in words:
        if word == "--resume_from":
            next(words, None)
        elif not word.startswith("--resume_from="):
            kept.append(word)
    return shlex.join([*program, *kept, "--resume_from", "latest"])
