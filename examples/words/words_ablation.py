"""What makes each objective learn where D is large, one option at a time: writes docs/results/ablation.json.

    python examples/words/words_ablation.py --seconds 60 --jobs 2

Every row is words_ocr.py's setting with some options changed, trained as long, in CPU time of one thread. One seed:
differences below three standard errors of a row, about .05, say nothing. Runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

WORDS = Path(__file__).resolve().parents[1] / "words_ocr.py"
ROW = "4 annealed steps"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "ablation.json"
VARIANTS: dict[str, tuple[str, dict]] = {  # name: the setting, and what differs from it
    "forward": ("forward", {}),
    "forward, learning rate 2e-4": ("forward", {"train_learning_rate": 2e-4}),
    "forward, learning rate 1e-3": ("forward", {"train_learning_rate": 1e-3}),
    "forward, no KL": ("forward", {"beta": 0.0}),
    "forward, sampler's levels": ("forward", {"forward_levels": "sampler"}),
    "forward, random levels": ("forward", {"forward_levels": "random"}),
    "forward, every step's image": ("forward", {"forward_images": "every"}),
    "forward, weights of the clean image": ("forward", {"train_level_weighting": "clean"}),
    "forward, weights of the velocity": ("forward", {"train_level_weighting": "velocity"}),
    "forward, old policy lags by .5": ("forward", {"old_policy_decay": 0.5, "old_policy_ramp": 0.05}),
    "forward, 2 inner epochs": ("forward", {"train_num_inner_epochs": 2}),
    "forward, LoRA of rank 8": ("forward", {"lora_rank": 8, "lora_alpha": 16}),
    "forward, 2 prompts of 48": ("forward", {"num_generations": 48}),
    "forward, 24 prompts of 4": ("forward", {"num_generations": 4}),
    "awm": ("forward", {"objective": "awm", "train_level_weighting": "velocity", "beta": 0.0}),
    "clipped": ("clipped", {}),
    "clipped, learning rate 3e-4": ("clipped", {"train_learning_rate": 3e-4}),
    "clipped, learning rate 3e-3": ("clipped", {"train_learning_rate": 3e-3}),
    "clipped, gaussian weights": ("clipped", {"train_level_weighting": "gaussian"}),
    "clipped, uniform weights": ("clipped", {"train_level_weighting": "uniform"}),
    "clipped, step credit": ("clipped", {"step_credit": "step"}),
    "clipped, terminal credit": ("clipped", {"step_credit": "terminal"}),
    "clipped, 2 antithetic siblings": (
        "clipped",
        {"step_credit": "step", "num_perturbations": 2, "antithetic_perturbations": True},
    ),
    "clipped, 4 inner epochs": ("clipped", {"train_num_inner_epochs": 4}),
    "paper": ("paper", {}),
    "clean kernel, M = 4": (
        "clipped",
        {"sample_kernel": "clean", "num_perturbations": 4, "step_credit": "step", "train_level_weighting": "gaussian"},
    ),
}
SMOOTH = ("forward, smooth reward", "clipped, smooth reward")  # the probability a letter instead of the edit distance
VARIANTS |= {name: (name.partition(",")[0], {}) for name in SMOOTH}


def run_words(size: str, setting: str, seed: int, seconds: float, output: Path, options: dict, reward: str) -> dict:
    """One training by one thread, or its summary where it was made before; a size's base is judged once."""
    if not (output / "summary.json").exists():
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(WORDS), "--size", size, "--setting", setting, "--seed", str(seed)]
        command += ["--seconds", str(seconds), "--base", str(output.parent / f"words_{size}_base.json")]
        command += ["--options", json.dumps(options), "--reward", reward, "--after", ROW, "--output_dir", str(output)]
        with open(output / "log.txt", "w") as log:
            subprocess.run(command, env=os.environ | ONE_THREAD, stdout=log, stderr=log, check=True)
    print(f"{output.name} done", flush=True)
    return json.loads((output / "summary.json").read_text())


def row_of(run: dict) -> dict:
    """What is told of one run."""
    before, after = run["before"][ROW], run["after"][ROW]
    row = {"D": run["D"], "reward_before": before["ocr"], "reward_after": after["ocr"]}
    row |= {"judge_after": after["second_ocr"], "colour_after": after["colour"], "print_after": after["print"]}
    return row | {name: run[name] for name in ("cpu_seconds", "epochs", "options")} | {"stderr": after["stderr"]}


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small"])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU time, each run's")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    def one(key: tuple[str, str]) -> dict:
        size, name = key
        setting, options = VARIANTS[name]
        folder = args.runs / f"{size}_{name.replace(' ', '_').replace(',', '')}_{args.seed}"
        reward = "ctc" if name in SMOOTH else "edit"
        return run_words(size, setting, args.seed, args.seconds, folder, options, reward)

    todo = list(product(args.sizes, args.only))
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row_of(run) for run in pool.map(one, todo)]
    table = {f"{name}, {size}": row for (size, name), row in zip(todo, rows, strict=True)}
    command = "python examples/words/words_ablation.py " + " ".join(sys.argv[1:])
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps({"command": command.strip(), "variants": table}, indent=1) + "\n")
    for name, row in sorted(table.items(), key=lambda item: -item[1]["reward_after"]):
        print(f"{row['reward_after']:.3f} +- {row['stderr']:.3f}  {row['epochs']:3d} epochs  {name}")


if __name__ == "__main__":
    main()
