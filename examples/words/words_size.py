"""The table of docs/learning.md: each setting at each size, several seeds; writes docs/results/size.json and the plot.

    python examples/words/words_size.py --sizes small large --settings forward clipped paper --seeds 0 1 2 --jobs 2

Runs of `words_ocr.py` whose summary.json lies in `runs/` already are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "words_ocr.py"
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "size.json"
ROW = "4 annealed steps"


def run(size: str, setting: str, seed: int, folder: Path) -> dict:
    """One training, by one thread, or its summary where it was made before."""
    output = folder / f"words_{size}_{setting}_{seed}"
    if not (output / "summary.json").exists():
        options = ["--size", size, "--setting", setting, "--seed", str(seed), "--output_dir", str(output)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "log.txt", "w") as log:
            subprocess.run(
                [sys.executable, str(EXAMPLE), *options], env=os.environ | threads, stdout=log, stderr=log, check=True
            )
    print(f"{size} {setting} {seed} done", flush=True)
    return json.loads((output / "summary.json").read_text())


def summarise(runs: list[dict]) -> dict:
    """A row of the table: means over seeds; `stderr` is that of the reward's gain, over words and seeds together."""
    before, after = ([run[when][ROW] for run in runs] for when in ("before", "after"))
    gains = [b["ocr"] - a["ocr"] for a, b in zip(before, after, strict=True)]
    words = statistics.mean(a["stderr"] ** 2 + b["stderr"] ** 2 for a, b in zip(before, after, strict=True))
    seeds = statistics.variance(gains) / len(gains) if len(gains) > 1 else 0.0
    mean = {
        f"{name}_{when}": round(statistics.mean(row[column] for row in rows), 4)
        for name, column in (("reward", "ocr"), ("judge", "second_ocr"), ("colour", "colour"), ("print", "print"))
        for when, rows in (("before", before), ("after", after))
    }
    ode = round(statistics.mean(run["before"]["32 ODE steps"]["ocr"] for run in runs), 4)
    return {"D": runs[0]["D"], **mean, "reward_base_32_ode": ode} | {
        "stderr": round(math.sqrt(words + seeds), 4),
        "gains": [round(gain, 4) for gain in gains],
        "seconds": round(statistics.mean(run["seconds"] for run in runs), 1),
        "epochs": runs[0]["epochs"],
        "seeds": [run["seed"] for run in runs],
    }


def plot(rows: dict[str, dict], path: Path) -> None:
    """Gain a second against D, a line a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for setting in dict.fromkeys(row["setting"] for row in rows.values()):
        mine = sorted((row for row in rows.values() if row["setting"] == setting), key=lambda row: row["D"])
        gains = [(row["reward_after"] - row["reward_before"]) / row["seconds"] for row in mine]
        errors = [row["stderr"] / row["seconds"] for row in mine]
        axes.errorbar([row["D"] for row in mine], gains, errors, marker="o", capsize=3, label=setting)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="D, elements of a latent", ylabel="gain of reward a second", title="one CPU thread")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "large"])
    parser.add_argument("--settings", nargs="+", default=["forward", "clipped", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    todo = list(product(args.sizes, args.settings, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda key: run(*key, args.runs), todo))
    rows = {}
    for size, setting in product(args.sizes, args.settings):
        mine = [run for run in runs if (run["size"], run["setting"]) == (size, setting)]
        rows[f"{setting}, {size}"] = {"setting": setting, **summarise(mine)}
    command = "python examples/words/words_size.py " + " ".join(sys.argv[1:])
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps({"command": command.strip(), "settings": rows}, indent=1) + "\n")
    plot(rows, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
