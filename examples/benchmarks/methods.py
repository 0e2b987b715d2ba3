"""Every preset on the embedded pipelines, from the same weights, with the same budgets: writes docs/benchmarks.md.

    python examples/benchmarks/methods.py --jobs 2             # or: make bench-methods
    python examples/benchmarks/methods.py --quick              # digits, one seed, the methods of the slow test

Each method is given the same learning rates for half the time with one seed, and then three seeds at the best of
them. Time is CPU time of one thread, so that runs side by side don't count against each other. Guidance is off and
groups are of one size for all. What was run already is read from `--runs`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench_run
import report
from distillers import DISTILLERS, run_distiller
from tasks import TASKS

from trl_tafs.presets import PRESETS

DOCS = Path(__file__).resolve().parents[2] / "docs"
RATE = 1e-3
METHODS: dict[str, dict[str, Any]] = {name: {"preset": name, "options": {}} for name in PRESETS}
METHODS["tafs_sum"] = {"preset": "tafs", "options": {"step_credit": "sum"}}  # Algorithm 1, line 18
METHODS["base"] = {"preset": "tafs", "options": {"train_learning_rate": 1e-9}}  # nothing moves
TABLE_4 = {str(n): {"preset": "tafs", "options": {"sample_num_steps": n + 1}} for n in (1, 5)}  # annealed steps
TABLE_5 = {
    f"{credit}, 2": {"preset": "tafs", "options": {"step_credit": credit, "num_advantage_steps": 2}}
    for credit in ("step", "sum")
}
SAME = {  # rows of the tables that a method is already: with one step both readings are the final image's advantage
    "table_4": {"3": "tafs"},
    "table_5": {"1, either": "tafs_without_step_advantage", "step, 3": "tafs", "sum, 3": "tafs_sum"},
}
GROUPS = {
    "fixed": {"preset": "tafs", "options": {}},
    "variance": {"preset": "tafs", "options": {"group_allocation": "variance"}},
    "streaming": {"preset": "tafs", "options": {"group_allocation": "streaming", "min_generations": 8}},
}
QUICK = ("tafs", "tafs_sum", "flow_grpo", "base")


class Bench:
    """Runs what isn't there yet, several side by side, and remembers."""

    def __init__(self, folder: Path, jobs: int, scale: float) -> None:
        """Results are in `folder`, a file a run; budgets of time are multiplied by `scale`."""
        self.folder, self.scale = folder, scale
        self.pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[..., dict], arguments: list[tuple]) -> list[dict]:
        """`function` of each, from the folder or computed."""
        futures: list[Any] = []
        for item in arguments:
            key = hashlib.sha256(json.dumps([function.__name__, *item], sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"{key}.json"
            futures.append(path if path.exists() else self.pool.submit(_keep, path, function, item))
        return [json.loads((item if isinstance(item, Path) else item.result()).read_text()) for item in futures]

    def seconds(self, task: str) -> float:
        """A run's budget."""
        return TASKS[task].seconds * self.scale

    def tune(self, task: str, methods: dict[str, dict]) -> dict[str, float]:
        """Each method's best learning rate: half the time, one seed, the better of both samplers at 4 steps."""
        tried = [(name, rate) for name in methods for rate in TASKS[task].rates]
        items = [
            (task, methods[name] | {"rate": rate}, 100, self.seconds(task) / 2, None, False) for name, rate in tried
        ]
        found = self.map(bench_run.run, items)
        best = dict.fromkeys(methods, (-1.0, 0.0))
        for (name, rate), result in zip(tried, found, strict=True):
            best[name] = max(best[name], (result["at_time"]["best"], rate))
        return {name: rate for name, (_, rate) in best.items()}

    def methods(self, task: str, methods: dict[str, dict], seeds: list[int], rates: dict[str, float]) -> dict:
        """All seeds of all methods; the budget of evaluations is what `tafs` takes in the time."""

        def run(keys: list[tuple[str, int]], evaluations: int | None) -> dict[tuple[str, int], dict]:
            items = [
                (task, methods[name] | {"rate": rates[name]}, seed, self.seconds(task), evaluations, True)
                for name, seed in keys
            ]
            return dict(zip(keys, self.map(bench_run.run, items), strict=True))

        found = run([("tafs", seed) for seed in seeds], None)
        budget = round(sum(r["at_time"]["evaluations"] for r in found.values()) / len(found))
        found |= run([(name, seed) for seed in seeds for name in methods if name != "tafs"], budget)
        return {name: [found[name, seed] for seed in seeds] for name in methods}

    def variants(self, task: str, variants: dict, seeds: list[int], rate: float) -> dict:
        """Variants of `tafs` at its learning rate, timed alike."""
        keys = [(name, seed) for name in variants for seed in seeds]
        items = [(task, variants[n] | {"rate": rate}, s, self.seconds(task), None, True) for n, s in keys]
        found = dict(zip(keys, self.map(bench_run.run, items), strict=True))
        return {name: [found[name, seed] for seed in seeds] for name in variants}

    def distillers(self, seeds: list[int]) -> dict:
        """The gradient-based ones, on digits; tuned as the others."""
        seconds, best = self.seconds("digits"), {}
        tried = [(name, rate) for name in DISTILLERS for rate in TASKS["digits"].rates]
        found = self.map(run_distiller, [(n, rate, 100, seconds / 2) for n, rate in tried])
        for (name, rate), result in zip(tried, found, strict=True):
            best[name] = max(best.get(name, (0.0, 0.0)), (result["at_time"]["best"], rate))
        return {n: self.map(run_distiller, [(n, best[n][1], seed, seconds) for seed in seeds]) for n in DISTILLERS}


def _keep(path: Path, function: Callable[..., dict], arguments: tuple) -> Path:
    """Compute and write, beside and then into place."""
    result = function(*arguments)
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    print(f"{function.__name__} {arguments[:3]}: {result['at_time'].get('best')}", flush=True)
    return path


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All that the page shows."""
    results: dict[str, Any] = {}
    for task in args.tasks:
        methods = {name: METHODS[name] for name in args.methods}
        rates = dict.fromkeys(methods, RATE) if args.quick else bench.tune(task, methods)
        results[task] = {"rates": rates, "methods": bench.methods(task, methods, args.seeds, rates)}
        if args.quick or task != "digits":
            continue
        rate = rates["tafs"]
        for table, variants in (("table_4", TABLE_4), ("table_5", TABLE_5)):
            runs_of = results[task]["methods"]
            own = {row: runs_of[name] for row, name in SAME[table].items() if name in runs_of}
            rows = own | bench.variants("digits", variants, args.seeds, rate)
            results[table] = dict(sorted(rows.items()))
        results["groups"] = bench.variants("mixed", GROUPS, args.seeds, rate)
        results["distillers"] = bench.distillers(args.seeds)
    return results


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "words"], choices=["digits", "words"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of all budgets of time")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--quick", action="store_true", help="digits, one seed, few methods, no tables beside")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_methods"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="where benchmarks.md and results/ are written")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.methods, args.seeds = ["digits"], list(QUICK), [0]
    with Bench(args.runs, args.jobs, args.scale) as bench:
        results = measure(bench, args)
    command = "python examples/benchmarks/methods.py " + " ".join(sys.argv[1:])
    report.write(results, args.docs, command.strip(), args.seeds)


if __name__ == "__main__":
    main()
