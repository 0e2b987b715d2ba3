"""How much of one policy gradient is signal, at each size: writes docs/results/gradients.json.

    python examples/words/words_gradients.py --sizes small large --batches 10

The policy stays where it is, at a fresh LoRA; each batch of 96 images gives one gradient g. `cosine` is that of one g
with the true one, E g: its square is the mean of g_i . g_j over pairs of batches, over the mean of |g|^2. Where the
estimate of the numerator is negative, 0 is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from words_components import load
from words_data import LAYOUTS
from words_judges import OCRReward
from words_ocr import COMMON, TRAIN_PROMPTS

from trl_tafs import TAFSGRPOConfig, TAFSGRPOTrainer, TAFSStableDiffusion3Pipeline

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "gradients.json"
CLIPPED = {"objective": "clipped", "train_level_weighting": "gaussian"}
BALANCED = {"objective": "clipped", "train_level_weighting": "balanced"}
ESTIMATORS = {
    "clipped, step": CLIPPED,
    "clipped, step, uniform": {**CLIPPED, "train_level_weighting": "uniform"},
    "clipped, step, balanced": BALANCED,
    "clipped, reward-to-go, balanced": {**BALANCED, "step_credit": "reward_to_go"},
    "clipped, terminal, balanced": {**BALANCED, "step_credit": "terminal"},
    "clipped, shared first noise, balanced": {**BALANCED, "share_initial_noise": True},
    "clipped, 2 siblings, balanced": {**BALANCED, "num_perturbations": 2},
    "clipped, 2 antithetic siblings, balanced": {
        **BALANCED,
        "num_perturbations": 2,
        "antithetic_perturbations": True,
    },
    "clean kernel, M = 4": {**CLIPPED, "sample_kernel": "clean", "num_perturbations": 4},
    "forward, random levels": {"objective": "forward", "forward_levels": "random"},
    "forward, sampler's levels": {"objective": "forward", "forward_levels": "sampler"},
    "forward, sampler's levels, clean": {
        "objective": "forward",
        "forward_levels": "sampler",
        "train_level_weighting": "clean",
    },
    "forward, trajectory": {"objective": "forward", "forward_levels": "trajectory"},
}


def gradient(trainer: TAFSGRPOTrainer, epoch: int) -> Tensor:
    """The loss's gradient on one epoch's experience, flat; parameters without one (LoRA's A at first) left out."""
    config = trainer.config
    experience = trainer.collector.collect(epoch, 0)
    prompts = experience.prompts
    advantages = trainer.algorithm.credit(experience.rewards, prompts, epoch).advantages
    rows = trainer.updater.minibatch_items(experience.batches, advantages, epoch)
    asked = [prompts.prompts[image] for image in rows.sample.tolist()]
    for parameter in trainer.policy.parameters:
        parameter.grad = None
    for i in range(0, len(rows), config.train_batch_size):
        chunk = rows[i : i + config.train_batch_size]
        loss = trainer.compute_loss(chunk, trainer.encode(asked[i : i + config.train_batch_size])).loss
        (loss * len(chunk) / len(rows)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters if p.grad.any()])


def cosine(gradients: Tensor) -> float:
    """That of one gradient with the true one; gradients (n, P)."""
    gram = (gradients @ gradients.T).double()
    count, own = len(gram), gram.diagonal().mean()
    cross = (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))
    return (cross.clamp(min=0) / own).sqrt().item()


def measure(size: str, options: dict, batches: int, folder: str) -> dict[str, float]:
    """One estimator's cosine, and seconds a batch (rollout, rewards, gradient)."""
    layout = LAYOUTS[size]
    config = TAFSGRPOConfig(
        project_kwargs={"project_dir": folder},
        height=layout.height,
        width=layout.width,
        disable_tqdm=True,
        **COMMON | options,
    )
    pipeline = load(size, TAFSStableDiffusion3Pipeline)
    trainer = TAFSGRPOTrainer(config, {"ocr": OCRReward()}, TRAIN_PROMPTS, pipeline)
    start = time.perf_counter()
    gradients = torch.stack([gradient(trainer, epoch) for epoch in range(batches)])
    seconds = (time.perf_counter() - start) / batches
    return {"cosine": round(cosine(gradients), 3), "seconds": round(seconds, 2)}


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict] = {}
    for size in args.sizes:
        for name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                rows.setdefault(name, {})[size] = measure(size, ESTIMATORS[name], args.batches, folder)
            print(f"{size} {name}: {rows[name][size]}", flush=True)
    command = "python examples/words/words_gradients.py " + " ".join(sys.argv[1:])
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps({"command": command.strip(), "estimators": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
