"""What a run needs of cards and of the network between them, from the models' configurations: no weights, no GPU.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --model flux1_dev --seconds 0.28

It prints the memory plan of the paper's run for DDP and FSDP2, the bytes that a GPU sends for an iteration, and hours
from the seconds of one evaluation of three images, measured by examples/benchmarks/speed.py --device cuda, or given.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass

import torch
from speed_models import build

from trl_tafs import TAFSGRPOConfig
from trl_tafs.training.memory import GIB, Footprint, measure_footprint, plan_memory
from trl_tafs.training.plan import EpochPlan, plan_epoch
from trl_tafs.training.simulation import Simulation

MODELS = ("sd35_medium", "flux1_dev")
GPUS = (8, 64, 512)
BACKWARD = 2.0  # evaluations that a backward pass costs; one more with checkpointing


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in an iteration, and the messages that they are in."""

    gradients: float  # the LoRA's, averaged once an optimizer step, by a ring
    gathers: float  # of blocks: with FSDP2, for every evaluation and again for every backward pass
    messages: int


def config_of(folder: str, **changes: object) -> TAFSGRPOConfig:
    """The paper's epoch: 4 steps, groups of 48, 3 images at once, 48 a process, encoded prompts."""
    settings = {
        "sample_batch_size": 3,
        "sample_num_batches_per_epoch": 16,
        "num_generations": 48,
        "train_batch_size": 3,
    }
    settings |= {"height": 512, "width": 512, "mixed_precision": "bf16", "objective": "clipped", "lora_rank": 32}
    settings |= {"lora_alpha": 64, "train_gradient_checkpointing": True, "beta": 0.01, "decode_batch_size": 1}
    return TAFSGRPOConfig(**(settings | {"project_kwargs": {"project_dir": folder}} | changes))


def evaluations(config: TAFSGRPOConfig, plan: EpochPlan) -> tuple[int, int]:
    """Of a process in an iteration: batches evaluated without a gradient, and forward and backward."""
    trained = plan.micro_batches_per_update * plan.updates_per_inner_epoch * config.train_num_inner_epochs
    reference = trained if config.beta else 0
    return plan.local_images // config.sample_batch_size * config.sample_num_steps + reference, trained


def traffic(footprint: Footprint, config: TAFSGRPOConfig, plan: EpochPlan, blocks: int, sharded: bool) -> Traffic:
    """Return what a GPU sends; a ring sends (N - 1) / N of a tensor to gather it, twice that to sum it."""
    part = (plan.world_size - 1) / plan.world_size
    still, trained = evaluations(config, plan)
    gathered = (still + 2 * trained) if sharded else 0  # a recomputed block is there for its backward pass
    steps = plan.updates_per_inner_epoch * config.train_num_inner_epochs
    weights = footprint.weights[footprint.denoiser_name]
    gradients = 2 * part * 4 * footprint.trained_parameters * steps
    return Traffic(gradients, part * weights * gathered, steps + gathered * blocks)


def seconds(config: TAFSGRPOConfig, plan: EpochPlan, evaluation: float, decode: float, reward: float = 0.0) -> float:
    """Return the seconds of an iteration on one process, from those of a batch's evaluation and decode.

    Args:
        config: of the run.
        plan: an epoch's.
        evaluation: seconds of one evaluation of a batch.
        decode: seconds to decode a batch.
        reward: seconds to score a batch, where nothing hides them.
    """
    still, trained = evaluations(config, plan)
    passes = 1 + BACKWARD + config.train_gradient_checkpointing
    scored = plan.local_images // config.sample_batch_size * config.num_trained_steps
    return evaluation * (still + passes * trained) + scored * (decode + reward)


def report(name: str, evaluation: float, decode: float, folder: str) -> None:
    """Print one model's tables."""
    config = config_of(folder)
    pipeline = build(name, "meta", torch.bfloat16)
    footprint = measure_footprint(Simulation(pipeline, config.height, config.width), config)
    blocks = sum(len(m) for m in pipeline.transformer.children() if isinstance(m, torch.nn.ModuleList)) + 2
    frozen, trained = footprint.weights["transformer"] / GIB, footprint.trained_parameters / 1e6
    print(f"\n{name}: {frozen:.1f} GiB frozen, {trained:.1f}M trained")
    heads = ("GPUs", "peak GiB", "24 GB", "80 GB", "sent GiB", "messages", "hours", "images/s")
    print(f"{'':8}" + "".join(f"{head:>10}" for head in heads))
    for sharded in (False, True):
        for gpus in GPUS:
            plan = plan_epoch(config, gpus)
            peak = plan_memory(footprint, config, plan, sharded=sharded).peak() / GIB
            sent = traffic(footprint, config, plan, blocks, sharded)
            took = seconds(config, plan, evaluation, decode)
            fits = ["yes" if peak <= size else "no" for size in (24e9 / GIB, 80e9 / GIB)]
            sums = (sent.gradients + sent.gathers) / GIB, sent.messages, took * 1500 / 3600, plan.total_images / took
            row = f"{'FSDP2' if sharded else 'DDP':8}{gpus:10}{peak:10.1f}{fits[0]:>10}{fits[1]:>10}"
            print(row + f"{sums[0]:10.2f}{sums[1]:10}{sums[2]:10.0f}{sums[3]:10.1f}")


def main() -> None:
    """Print the tables of the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one evaluation of three images")
    parser.add_argument("--decode_seconds", type=float, default=0.1, help="to decode three images")
    options = parser.parse_args()
    if not all(math.isfinite(s) and s > 0 for s in (options.seconds, options.decode_seconds)):
        parser.error(f"--seconds {options.seconds} and --decode_seconds {options.decode_seconds} must be above 0")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.model or MODELS:
            report(name, options.seconds, options.decode_seconds, folder)


if __name__ == "__main__":
    main()
