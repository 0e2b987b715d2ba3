"""How much of the rewards' latency asynchronous scoring hides, on the embedded pipeline.

    python examples/async_rewards.py [--share 0.8] [--batches 8] [--workers 1]

The reward waits, as one does on another card or behind HTTP: `--share` of one sampling step, as measured in this run.
Prints seconds of collecting one epoch's experience without a reward, with it in turn, and with it in a thread; and the
share of the intermediate rewards' latency that the thread hides: all of it, less the time that the trainer was seen
waiting for rewards, but for the epoch's last reward, which has no sampling left to hide behind. Checks that both give
the same rewards.
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


def make_trainer(reward: Waiting, args: argparse.Namespace, threads: int, folder: str) -> TAFSGRPOTrainer:
    """A trainer on the digits, whose rewards are computed in `threads`; 0: in turn with the sampling."""
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
    return trainer


def collect(trainer: TAFSGRPOTrainer, args: argparse.Namespace) -> tuple[float, list[torch.Tensor]]:
    """Seconds of one epoch's experience, and its rewards."""
    batches = trainer.collector.local_batches(trainer.prompts.batch(0, args.batches, args.batch_size))
    start = time.perf_counter()
    parts, fault = trainer.collector.sampler.sample(batches, 0)
    if fault is not None:
        raise fault
    return time.perf_counter() - start, [part.scores for part in parts]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.8, help="the reward's latency in sampling steps")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="each measures all three, and the median round counts")
    args = parser.parse_args()
    reward, rounds = Waiting(), []
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        in_turn, threaded = make_trainer(reward, args, 0, first), make_trainer(reward, args, args.workers, second)
        for trainer in (in_turn, threaded):
            collect(trainer, args)
        for _ in range(args.rounds):
            reward.seconds = 0.0
            alone, _ = collect(in_turn, args)
            reward.seconds = args.share * alone / (args.batches * STEPS)
            waited, expected = collect(in_turn, args)
            threaded.stopwatch.pop()
            hidden_by, got = collect(threaded, args)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                raise SystemExit("the rewards differ")
            intermediate = args.batches * (SCORED - 1) * reward.seconds
            late = max(0.0, threaded.stopwatch.pop()["time/reward"] - reward.seconds)
            rounds.append((1 - late / intermediate, alone, waited, hidden_by, reward.seconds))
    share, alone, waited, hidden_by, latency = sorted(rounds)[len(rounds) // 2]
    print(json.dumps({
        "seconds": {"no reward": round(alone, 3), "in turn": round(waited, 3), "in a thread": round(hidden_by, 3)},
        "reward_latency": round(latency, 4),
        "intermediate_latency_hidden": round(share, 3),
        "all_rounds": sorted(round(row[0], 2) for row in rounds),
        "rewards": "identical",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
