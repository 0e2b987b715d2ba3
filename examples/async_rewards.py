"""How much of the rewards' latency asynchronous scoring hides, on the embedded pipeline.

    python examples/async_rewards.py [--share 0.8] [--batches 4] [--workers 1]

The reward waits, as one does on another card or behind HTTP: `--share` of one sampling step, as measured in this run.
Prints seconds of collecting one epoch's experience without a reward, with it in turn, and with it in a thread; and the
share of the intermediate rewards' latency (all but the last step's of each batch, which has no step left to hide
behind) that the thread hides. Checks that both give the same rewards.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "digits"))

import torch

from trl_tafs import TAFSGRPOConfig, TAFSGRPOTrainer, TAFSStableDiffusion3Pipeline

PIPELINE = Path(__file__).resolve().parent / "digits" / "pipeline"
STEPS, SCORED = 4, 3  # of sampling; those of them whose images are scored


class Waiting:
    """The images' mean, after `seconds`."""

    __name__ = "waiting"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, images, prompts, prompt_metadata):
        """(B,)."""
        time.sleep(self.seconds)
        return images.mean((1, 2, 3))


def collect(reward: Waiting, args: argparse.Namespace, threads: int) -> tuple[float, list[torch.Tensor]]:
    """Seconds of one epoch's experience, the second one of two, and its rewards."""
    with tempfile.TemporaryDirectory() as folder:
        config = TAFSGRPOConfig(
            objective="clipped",  # whose every step is scored
            project_kwargs={"project_dir": folder},
            mixed_precision="no",
            sample_batch_size=args.batch_size,
            sample_num_batches_per_epoch=args.batches,
            num_generations=args.batch_size,
            train_batch_size=args.batch_size,
            async_reward_computation=threads > 0,
            max_workers=max(threads, 1),
            disable_tqdm=True,
        )
        pipeline = TAFSStableDiffusion3Pipeline.from_pretrained(PIPELINE)
        trainer = TAFSGRPOTrainer(config, reward, ["seven", "one", "four"], pipeline)
        assert len(trainer.algorithm.scored_steps_at(0)) == SCORED
        batches = trainer._batches(trainer.prompts.batch(0, args.batches, args.batch_size))
        trainer.collector.collect(batches, 0, 0)
        start = time.perf_counter()
        parts, fault = trainer.collector.collect(batches, 0, 0)
        if fault is not None:
            raise fault
        return time.perf_counter() - start, [part.scores for part in parts]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.8, help="the reward's latency in sampling steps")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    reward = Waiting()
    alone, _ = collect(reward, args, threads=0)
    reward.seconds = args.share * alone / (args.batches * STEPS)
    in_turn, expected = collect(reward, args, threads=0)
    hidden_by, got = collect(reward, args, threads=args.workers)
    if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
        raise SystemExit("the rewards differ")
    intermediate = args.batches * (SCORED - 1) * reward.seconds
    last = reward.seconds  # nothing is sampled after the last batch's last step
    share = min(1.0, 1 - (hidden_by - alone - last) / intermediate)
    print(json.dumps({
        "seconds": {"no reward": round(alone, 3), "in turn": round(in_turn, 3), "in a thread": round(hidden_by, 3)},
        "reward_latency": round(reward.seconds, 4),
        "intermediate_latency_hidden": round(share, 3),
        "rewards": "identical",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
