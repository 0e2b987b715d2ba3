"""What an iteration costs over the evaluations, backward passes, decodes and rewards that its method asks for.

    make bench-speed                                             # on a CPU: digits, and a model of 36M weights
    python examples/benchmarks/speed.py --device cuda            # SD3.5-medium and FLUX.1-dev at full size
    python examples/benchmarks/speed.py --device cuda --models sd35_medium --batches 3 8

Floor and iteration alternate in one process, and what is compared are CPU seconds: other jobs on the machine weigh on
both alike. Weights are random and nothing is downloaded. Writes runs/bench-speed/summary.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_models import build, make_trainer

from trl_tafs.presets import preset

EXAMPLES = Path(__file__).resolve().parents[1]
OUT = Path("runs/bench-speed")
# Steps and trained steps of the paper's table of costs: 10 and 6, 25 and 4, 25 and 14. None has guidance here.
PLAIN = {"sample_guidance_scale": 1.0, "train_cfg": False, "train_updates_per_epoch": None}
METHODS: dict[str, dict[str, Any]] = {
    "tafs": preset("tafs"),
    "tafs, KL at one row": preset("tafs") | {"train_kl_rows": "one"},
    "flow_grpo": preset("flow_grpo") | PLAIN | {"train_timestep_fraction": 6 / 9},
    "mix_grpo": preset("mix_grpo") | PLAIN,
    "dance_grpo": preset("dance_grpo") | PLAIN | {"sample_num_steps": 25, "train_timestep_fraction": 14 / 24},
}
OURS = "tafs, KL at one row"
SIZES = {  # images an iteration, rows of a batch
    "digits": {"sample_batch_size": 96, "sample_num_batches_per_epoch": 1, "num_generations": 48},
    "small": {"sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "num_generations": 2},
}
SIZES["digits"] |= {"train_batch_size": 96, "max_sequence_length": 8, "mixed_precision": "no"}
SIZES["small"] |= {"train_batch_size": 4, "height": 64, "width": 64, "mixed_precision": "no"}


def trainer_of(model: str, method: str, device: str = "cpu", **options: Any) -> Any:
    """A trainer of a method on a model, of its own pipeline."""
    if model == "digits":
        sys.path.insert(0, str(EXAMPLES / "digits"))
        from quickstart import load

        pipeline = load()
    else:
        pipeline = build(model, device, torch.float32 if device == "cpu" else torch.bfloat16)
    return make_trainer(pipeline, model, **METHODS[method] | SIZES.get(model, {}) | options)


class Floor:
    """The evaluations, backward passes, decodes and rewards of one iteration, called without anything around them."""

    def __init__(self, trainer: Any) -> None:
        config, policy, pipeline = trainer.config, trainer.policy, trainer.sd_pipeline
        self.trainer, size = trainer, config.train_batch_size
        self.images = config.sample_batch_size * config.sample_num_batches_per_epoch
        rows = self.images * config.num_replayed_rows
        held = rows if config.train_kl_rows == "all" else self.images
        self.evaluations, self.updates = config.sample_num_steps * self.images, rows
        self.references = held if config.beta else 0
        self.decodes = self.images * len(trainer.algorithm.scored_steps_at(0))
        device, shape = trainer.accelerator.device, pipeline.latent_shape(trainer.height, trainer.width)
        self.batch = min(size, config.sample_batch_size)
        self.x = torch.randn(self.batch, *shape, device=device).to(policy.storage_dtype)
        self.level = torch.full((self.batch,), 0.5, device=device)
        self.conditioning = trainer.encode(["one", "two"] * (self.batch // 2) or ["one"])

    def __call__(self) -> dict[str, float]:
        """Seconds by part."""
        policy, pipeline, batch = self.trainer.policy, self.trainer.sd_pipeline, self.batch
        arguments = (self.x, self.level, self.conditioning)

        def update() -> None:
            with policy.updating():
                pipeline.velocity(*arguments, policy.model).square().mean().backward()
            policy.optimizer.zero_grad()

        def decode() -> None:
            self.trainer.rewards(pipeline.decode_latents(self.x.float()).cpu(), ["one"] * batch, [{}] * batch)

        with torch.no_grad():
            parts = {
                "rollout": seconds(lambda: pipeline.velocity(*arguments, policy.model), self.evaluations / batch),
                "reference": seconds(lambda: policy.reference(*arguments), self.references / batch),
                "decode and reward": seconds(decode, self.decodes / batch),
            }
        return parts | {"update": seconds(update, self.updates / batch)}


def seconds(call: Callable[[], Any], times: float = 1) -> float:
    """CPU seconds of so many calls, a part of one counted as that part."""
    start, whole = time.process_time(), max(1, round(times)) if times else 0
    for _ in range(whole):
        call()
    return (time.process_time() - start) * (times / whole if whole else 0)


def over_floor(model: str, rounds: int) -> dict[str, Any]:
    """Iteration and floor in turn; the median of their ratio."""
    trainer = trainer_of(model, OURS)
    floor, found = Floor(trainer), []
    for epoch in range(rounds + 1):
        least = floor()
        taken = seconds(lambda epoch=epoch: trainer.step(epoch, epoch))
        found.append({"floor": sum(least.values()), "iteration": taken} | least)
    found = found[1:]  # the first one warms up
    middle = {name: statistics.median(item[name] for item in found) for name in found[0]}
    return middle | {"iteration_over_floor": statistics.median(f["iteration"] / f["floor"] for f in found)}


def methods(model: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of an iteration of each method, in turn, everything counted."""
    trainers = {name: trainer_of(model, name) for name in METHODS}
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for epoch in range(rounds):
        for name, trainer in trainers.items():
            taken[name].append(seconds(lambda t=trainer, epoch=epoch: t.step(epoch, epoch)))
    result: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in taken.items()}}
    result["evaluations"] = {
        n: t.policy.evaluations / rounds / Floor(t).images for n, t in trainers.items()
    }  # without backward passes
    for other in ("flow_grpo", "mix_grpo", "dance_grpo"):
        ratios = [a / b for a, b in zip(taken[OURS], taken[other], strict=True)]
        result[f"over_{other.removesuffix('_grpo')}_grpo"] = statistics.median(ratios)
    return result


def growth() -> dict[str, float]:
    """Seconds of an iteration on digits when one size doubles, over those before; of work that is even, 2 or 1."""
    changes = {
        "base": {},
        "twice the images": {"sample_num_batches_per_epoch": 2},
        "batches of half the size": {
            "sample_batch_size": 48,
            "sample_num_batches_per_epoch": 2,
            "train_batch_size": 48,
        },
        "7 steps, 6 of them trained": {"sample_num_steps": 7},
        "twice the height": {"height": 16},
    }
    trainers = {name: trainer_of("digits", OURS, **change) for name, change in changes.items()}
    taken: dict[str, list[float]] = {name: [] for name in trainers}
    for epoch in range(4):
        for name, trainer in trainers.items():
            taken[name].append(seconds(lambda t=trainer, epoch=epoch: t.step(epoch, epoch)))
    base = statistics.median(taken.pop("base")[1:])
    return {name: statistics.median(values[1:]) / base for name, values in taken.items()}


def peak(kind: str) -> None:
    """Print the bytes that this process needs beyond its libraries for one forward and backward pass, or iterations."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = trainer_of("small", OURS)
    floor = Floor(trainer)
    if kind == "floor":
        with trainer.policy.updating():
            trainer.sd_pipeline.velocity(
                floor.x, floor.level, floor.conditioning, trainer.policy.model
            ).mean().backward()
    else:
        trainer.step(0, 0)
        trainer.step(1, 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_over_floor() -> float:
    """Peak memory of two iterations over that of weights and one forward and backward pass, each in a new process."""
    found = {}
    for kind in ("floor", "iteration"):
        command = [sys.executable, __file__, "--peak", kind]
        found[kind] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found["iteration"] / found["floor"]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", default=["sd35_medium", "flux1_dev"], help="on a GPU")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 3, 8, 16], help="on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="digits alone, one round")
    parser.add_argument("--peak", choices=("floor", "iteration"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.peak:
        peak(given.peak)
        return
    if given.device == "cuda":
        from speed_gpu import table

        summary: dict[str, Any] = {"gpu": table(given.models, given.batches)}
    else:
        summary = on_cpu(1 if given.quick else given.rounds, given.quick)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def on_cpu(rounds: int, quick: bool) -> dict[str, Any]:
    """All that is measured on a CPU; the ratios at the top."""
    digits = over_floor("digits", 3 * rounds)
    summary: dict[str, Any] = {"iteration_over_floor": digits["iteration_over_floor"], "digits": digits}
    if quick:
        return summary
    small, compared = over_floor("small", rounds), methods("small", rounds)
    ratios = {name: value for name, value in compared.items() if name.startswith("over_")}
    details = {"small": small, "methods": compared, "growth": growth()}
    return summary | ratios | {"peak_memory_over_floor": peak_over_floor()} | details


if __name__ == "__main__":
    main()
