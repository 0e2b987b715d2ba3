"""`trl-tafs plan`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from trl_tafs.cli.arguments import ScriptArguments, parse_arguments, pipeline_class
from trl_tafs.cli.command import CommandOptions
from trl_tafs.cli.parsing import check_numbers

# Bytes of a linear layer's weight: nf4 with a float32 scale for each 64, int8 with one a row.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
GIB = 2**30


@dataclass
class PlanOptions(CommandOptions):
    """What the run is planned for."""

    title: ClassVar[str] = "Plan"

    gpu_memory: float | None = field(default=None, metadata={"help": "Of the card, in GiB."})
    processes: int = field(default=1, metadata={"help": "GPUs."})
    processes_per_machine: int | None = field(
        default=None, metadata={"help": "Those that share a host; None: at most 8."}
    )
    fsdp2: bool = field(default=False, metadata={"help": "Shard the denoiser among all of them."})
    json: str | None = field(default=None, metadata={"help": "A file for the plan, for a machine."})


TOLD = "All options of `train` count. No weights are loaded. The exit code is 1 if it doesn't fit."


def plan(argv: Sequence[str]) -> Callable[[], int]:
    """Say what a run will need of a GPU, the host and the disk, from configurations alone; takes train's arguments."""
    told = {"prog": "trl-tafs plan", "epilog": TOLD, "description": plan.__doc__}
    arguments, config, options = parse_arguments(argv, [PlanOptions], **told)
    check_numbers(options, processes=1, processes_per_machine=1, gpu_memory=0)
    return lambda: _plan(options, arguments, config)


def _plan(options: PlanOptions, arguments: ScriptArguments, config: Any) -> int:
    from trl_tafs.pipelines.skeleton import load_skeleton
    from trl_tafs.policy.base import DTYPES, image_size
    from trl_tafs.policy.sharding import check_shards
    from trl_tafs.training.advice import make_plan
    from trl_tafs.training.plan import plan_epoch
    from trl_tafs.training.simulation import Simulation

    loader, dtype = pipeline_class(arguments.pipeline_class), DTYPES[config.mixed_precision]
    given = {} if dtype is None else {"dtype": dtype}
    pipeline = load_skeleton(arguments.pretrained_model, loader, revision=arguments.pretrained_revision, **given)
    height, width = image_size(pipeline, config)
    if options.fsdp2:
        check_shards(config)
        if arguments.quantization and pipeline.denoiser_name in arguments.quantized_components:
            raise ValueError("--fsdp2 can't shard a quantized denoiser; leave one of the two out")
    rate = QUANTIZED_BYTES.get(arguments.quantization or "")
    quantized = {} if rate is None else dict.fromkeys(arguments.quantized_components, rate)
    capacity = None if options.gpu_memory is None else round(options.gpu_memory * GIB)
    made = make_plan(
        Simulation(pipeline, height, width),
        config,
        plan_epoch(config, options.processes),
        rewards=planned_rewards(arguments),
        quantized=quantized,
        capacity=capacity,
        sharded=options.fsdp2,
    )
    print(f"{type(pipeline).__name__}, {height} x {width}")
    print(made.report(capacity, min(options.processes, options.processes_per_machine or 8)))
    if config.prompt_cache_dir is not None:
        print(f"prompt_cache_dir {1000 * made.prompt / GIB:.2f} GiB for 1,000 prompts")
    if options.json is not None:
        told = {"peak": made.peak(), "phases": made.phases, "host": made.host, "prompt": made.prompt}
        told |= {"advice": list(made.advice), "notes": list(made.notes), "capacity": capacity}
        Path(options.json).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return int(capacity is not None and made.peak() > capacity)


def planned_rewards(arguments: ScriptArguments) -> int:
    """Return the bytes of the weights that training and held-out rewards will put on the device."""
    from trl_tafs.options import decode_dict
    from trl_tafs.rewards.loading import planned_bytes

    given = decode_dict("reward_options", arguments.reward_options)
    return planned_bytes(arguments.reward, given) + planned_bytes(arguments.eval_reward or (), given)
