"""The table of docs/learning.md: each setting at each size, several seeds, as long each; writes size.json and the plot.

    python examples/words/words_size.py --seconds 120 --jobs 2

Time is CPU time of one thread, so that runs side by side don't count against each other. Digits, D = 64, stand beside
the words as a third size, by quickstart.py with the same settings; their reward is a classifier's. Runs whose
summary.json lies in the folder of runs already are not made again.
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

WORDS = Path(__file__).resolve().parents[1] / "words_ocr.py"
DIGITS = Path(__file__).resolve().parents[1] / "digits" / "quickstart.py"
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "size.json"
ROW = "4 annealed steps"
AFTER = (ROW, "8 annealed steps", "4 ODE steps", "32 ODE steps")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
DIGIT_SETTINGS = {  # as SETTINGS of words_ocr.py
    "forward": ["--objective", "forward"],
    "clipped": ["--objective", "clipped", "--step_credit", "reward_to_go"],
    "paper": ["--objective", "clipped", "--level_weighting", "gaussian"],
}


def run(script: Path, options: list[str], output: Path) -> dict:
    """One training, by one thread, or its summary where it was made before."""
    if not (output / "summary.json").exists():
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), *options, "--output_dir", str(output)]
        with open(output / "log.txt", "w") as log:
            subprocess.run(command, env=os.environ | ONE_THREAD, stdout=log, stderr=log, check=True)
    print(f"{output.name} done", flush=True)
    return json.loads((output / "summary.json").read_text())


def run_words(
    size: str,
    setting: str,
    seed: int,
    seconds: float,
    folder: Path,
    options: dict | None = None,
    base: Path | None = None,
    reward: str = "edit",
) -> dict:
    """One setting of words_ocr.py; the base of a size is judged once, and its figures kept in the folder `base`."""
    name = f"words_{size}_{setting}_{seed}"
    arguments = ["--size", size, "--setting", setting, "--seed", str(seed), "--seconds", str(seconds)]
    arguments += ["--base", str((base or folder) / f"words_{size}_base.json"), "--options", json.dumps(options or {})]
    arguments += ["--reward", reward, "--after", *([ROW] if options is not None else AFTER)]
    return run(WORDS, arguments, folder / name)


def run_digits(setting: str, seed: int, folder: Path) -> dict:
    """Quickstart's 40 epochs, told as words_ocr.py tells its own."""
    options = ["--seed", str(seed), *DIGIT_SETTINGS[setting]]
    summary = run(DIGITS, options, folder / f"digits_{setting}_{seed}")
    told = {"D": 64, "size": "digits", "setting": setting}
    told |= {name: summary[name] for name in ("seed", "epochs", "seconds", "cpu_seconds")}
    for when in ("before", "after"):
        row = summary[when]["annealed"]["4"]
        stderr = math.sqrt(row["reward"] * (1 - row["reward"]) / summary["images"])
        told[when] = {ROW: {"ocr": row["reward"], "second_ocr": row["held_out"], "stderr": stderr}}
    told["before"]["32 ODE steps"] = {"ocr": summary["others"]["base, 32 ODE steps"]["reward"]}
    return told


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
        if column in rows[0]
    }
    ode = round(statistics.mean(run["before"]["32 ODE steps"]["ocr"] for run in runs), 4)
    return {"D": runs[0]["D"], **mean, "reward_base_32_ode": ode} | {
        "stderr": round(math.sqrt(words + seeds), 4),
        "gains": [round(gain, 4) for gain in gains],
        "seconds": round(statistics.mean(run["seconds"] for run in runs), 1),
        "cpu_seconds": round(statistics.mean(run["cpu_seconds"] for run in runs), 1),
        "epochs": [run["epochs"] for run in runs],
        "seeds": [run["seed"] for run in runs],
    }


def plot(rows: dict[str, dict], path: Path) -> None:
    """Share of the distance to 1 that is closed in a minute, against D, a line a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for setting in dict.fromkeys(row["setting"] for row in rows.values()):
        mine = sorted((row for row in rows.values() if row["setting"] == setting), key=lambda row: row["D"])
        scale = [60 / row["cpu_seconds"] / (1 - row["reward_before"]) for row in mine]
        gains = [(row["reward_after"] - row["reward_before"]) * factor for row, factor in zip(mine, scale, strict=True)]
        errors = [row["stderr"] * factor for row, factor in zip(mine, scale, strict=True)]
        axes.errorbar([row["D"] for row in mine], gains, errors, marker="o", capsize=3, label=setting)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="D, elements of a latent", ylabel="share of the distance to 1 closed in a CPU minute")
    axes.set_title("digits, words small, words large; three seeds")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["digits", "small", "large"])
    parser.add_argument("--settings", nargs="+", default=list(DIGIT_SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120.0, help="of CPU time, each words run's")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    def one(key: tuple[str, str, int]) -> dict:
        size, setting, seed = key
        if size == "digits":
            return run_digits(setting, seed, args.runs)
        return run_words(size, setting, seed, args.seconds, args.runs)

    todo = list(product(args.sizes, args.settings, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(one, todo))
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
