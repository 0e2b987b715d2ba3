"""Every preset on the embedded pipelines, from the same weights, with the same budgets: writes docs/benchmarks.md.

    python examples/benchmarks/methods.py --jobs 2             # or: make bench-methods
    python examples/benchmarks/methods.py --quick              # digits, one seed, stored rates: a quarter of an hour

What an epoch of each method takes is measured first, in turn; a budget of time is then a number of epochs, so that runs
side by side don't count against each other and a repeated run has the same results. Each method tries the same learning
rates for half of it, judged on prompts, noise and a seed that nothing is reported of; then three seeds at the best of
them. Guidance is off and groups are of one size for all. What was run already is read from `--runs`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench_run
import report
from distillers import DISTILLERS, chosen_distiller, run_distiller, step_seconds
from tasks import TASKS

from trl_tafs.presets import PRESETS

DOCS = Path(__file__).resolve().parents[2] / "docs"
TASK_NAMES = ("digits", "words", "scenes")


def variant(preset: str, **options: Any) -> dict[str, Any]:
    """A method: a preset and what differs from it."""
    return {"preset": preset, "options": options}


def of_presets() -> dict[str, dict[str, Any]]:
    """Every preset at one optimizer step an epoch; those whose source takes more once more, with as many."""
    found = {}
    for name, settings in PRESETS.items():
        updates = settings.get("train_updates_per_epoch")
        found[name] = variant(name, train_updates_per_epoch=1) if updates else variant(name)
        if updates:
            found[f"{name}, {updates} updates"] = variant(name)
    return found


FOUR_STEPS = {"sample_num_steps": 4, "sample_levels": "uniform", "train_updates_per_epoch": 1}
METHODS: dict[str, dict[str, Any]] = of_presets()
METHODS["tafs_sum"] = variant("tafs", step_credit="sum")  # Algorithm 1, line 18
# What tells the paper's ideas apart: few steps of an SDE, with one credit and with each step's own
METHODS["flow_sde, 4 steps"] = variant("flow_grpo", **FOUR_STEPS)
METHODS["flow_cps, 4 steps"] = variant("flow_cps", **FOUR_STEPS)
METHODS["flow_cps, 4 steps, step credit"] = variant("flow_cps", **FOUR_STEPS, step_credit="step")
METHODS["tafs_annealed, flow_sde"] = variant("tafs_annealed", sample_kernel="flow_sde")
METHODS["tafs_annealed, terminal credit"] = variant("tafs_annealed", step_credit="terminal")
METHODS["base"] = variant("tafs", train_learning_rate=1e-9)  # nothing moves
TABLE_4 = {str(n): variant("tafs", sample_num_steps=n + 1) for n in (1, 5)}  # annealed steps
TABLE_5 = {f"{credit}, 2": variant("tafs", step_credit=credit, num_advantage_steps=2) for credit in ("step", "sum")}
SAME = {  # rows of the tables that a method is already: with one step both readings are the final image's advantage
    "table_4": {"3": "tafs"},
    "table_5": {"1, either": "tafs_without_step_advantage", "step, 3": "tafs", "sum, 3": "tafs_sum"},
}
GROUPS = {
    "fixed": variant("tafs"),
    "variance": variant("tafs", group_allocation="variance"),
    "streaming": variant("tafs", group_allocation="streaming", min_generations=8),
}


@dataclass(frozen=True)
class Epochs:
    """A budget of time, for one method: `count` epochs of `seconds` each."""

    count: int
    seconds: float

    def facts(self, budget: float) -> dict[str, float]:
        """What a run is told by."""
        return {"budget": budget, "seconds_per_epoch": self.seconds}


class Bench:
    """Runs what isn't there yet, several side by side, and remembers."""

    def __init__(self, folder: Path, jobs: int, scale: float) -> None:
        """Results are in `folder`, a file a run; budgets of time are multiplied by `scale`."""
        self.folder, self.scale = folder, scale
        # a fresh process now and then: what torch and the reward engines keep isn't given back
        self.pool = get_context("spawn").Pool(jobs, maxtasksperchild=8)
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.terminate()

    def map(self, function: Callable[..., dict], arguments: list[tuple]) -> list[dict]:
        """`function` of each, from the folder or computed."""
        futures: list[Any] = []
        for item in arguments:
            key = hashlib.sha256(json.dumps([function.__name__, *item], sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"{key}.json"
            futures.append(path if path.exists() else self.pool.apply_async(_keep, (path, function, item)))
        return [json.loads((item if isinstance(item, Path) else item.get()).read_text()) for item in futures]

    def seconds(self, task: str) -> float:
        """A run's budget."""
        return TASKS[task].seconds * self.scale

    def epochs(self, task: str, methods: dict[str, dict]) -> dict[str, Epochs]:
        """What the budget is in epochs of each method, and what one takes; measured with nothing beside."""
        (found,) = self.map(bench_run.epoch_seconds, [(task, methods)])
        return self.budgeted(task, {name: found["seconds"][name] for name in methods})

    def budgeted(self, task: str, seconds: dict[str, float]) -> dict[str, Epochs]:
        """So many epochs of so many seconds as the budget allows."""
        return {name: Epochs(max(2, round(self.seconds(task) / value)), value) for name, value in seconds.items()}

    def tune(self, task: str, methods: dict[str, dict], epochs: dict[str, Epochs]) -> dict[str, float]:
        """Each method's best learning rate: half the budget, a seed, prompts and noise of its own."""
        rates = {name: method["options"].get("train_learning_rate") for name, method in methods.items()}
        fixed = {name: rate for name, rate in rates.items() if rate is not None}
        tried = [(name, rate) for name in methods if name not in fixed for rate in TASKS[task].rates]
        items = [(task, methods[n] | {"rate": rate}, 100, max(1, epochs[n].count // 2)) for n, rate in tried]
        best = dict.fromkeys(methods, (-1.0, 0.0))
        for (name, rate), result in zip(tried, self.map(bench_run.chosen, items), strict=True):
            best[name] = max(best[name], (result["best"], rate))
        return {name: rate for name, (_, rate) in best.items()} | fixed

    def methods(
        self, task: str, methods: dict[str, dict], seeds: list[int], rates: dict[str, float], epochs: dict[str, Epochs]
    ) -> dict[str, list[dict]]:
        """All seeds of all methods; the budget of evaluations is what `tafs` takes in the time."""
        rated = {name: method | {"rate": rates[name]} for name, method in methods.items()}
        found = self.variants(task, {"tafs": rated.pop("tafs")}, seeds, epochs)
        budget = round(sum(run["at_time"]["evaluations"] for run in found["tafs"]) / len(seeds))
        return found | self.variants(task, rated, seeds, epochs, budget)

    def variants(
        self,
        task: str,
        methods: dict[str, dict],
        seeds: list[int],
        epochs: dict[str, Epochs],
        evaluations: int | None = None,
    ) -> dict[str, list[dict]]:
        """All seeds of methods that have a rate."""
        items = [(task, methods[n], seed, epochs[n].count, evaluations) for seed in seeds for n in methods]
        found = iter(self.map(bench_run.run, items))
        runs = {(seed, n): next(found) | epochs[n].facts(self.seconds(task)) for seed in seeds for n in methods}
        return {n: [runs[seed, n] for seed in seeds] for n in methods}

    def distillers(self, seeds: list[int]) -> dict:
        """The gradient-based ones, on digits; tuned as the others."""
        seconds, best = self.seconds("digits"), {}
        timed = zip(DISTILLERS, self.map(step_seconds, [(name,) for name in DISTILLERS]), strict=True)
        steps = {name: round(seconds / found["seconds"]) for name, found in timed}
        tried = [(name, rate) for name in DISTILLERS for rate in TASKS["digits"].rates]
        found = self.map(chosen_distiller, [(n, rate, 100, steps[n] // 2) for n, rate in tried])
        for (name, rate), result in zip(tried, found, strict=True):
            best[name] = max(best.get(name, (0.0, 0.0)), (result["best"], rate))
        return {n: self.map(run_distiller, [(n, best[n][1], seed, steps[n]) for seed in seeds]) for n in DISTILLERS}


def _keep(path: Path, function: Callable[..., dict], arguments: tuple) -> Path:
    """Compute and write, beside and then into place."""
    result = function(*arguments)
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    told = result["at_time"]["best"] if "at_time" in result else result.get("best", result.get("seconds"))
    print(f"{function.__name__} {arguments[:3]}: {told}", flush=True)
    return path


def stored(task: str, methods: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """What docs/results/methods.json has of these methods: rates, and what an epoch takes."""
    path = DOCS / "results" / "methods.json"
    rows = json.loads(path.read_text())["presets"] if path.is_file() else {}
    return {name: rows[name][task] for name in methods if task in rows.get(name, {})}


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All that the page shows."""
    results: dict[str, Any] = {}
    tables = {"table_4": TABLE_4, "table_5": TABLE_5}
    for task in args.tasks:
        beside = {} if args.quick or task != "digits" else tables
        methods = {name: METHODS[name] for name in args.methods}
        if args.quick:
            known = stored(task, methods)
            if missing := methods.keys() - known.keys():
                print(f"without a stored rate, left out: {', '.join(sorted(missing))}", flush=True)
            methods = {name: methods[name] for name in known}
            epochs = bench.budgeted(task, {name: row["seconds_per_epoch"] for name, row in known.items()})
            rates = {name: row["rate"] for name, row in known.items()}
        else:
            epochs = bench.epochs(task, methods | {row: v for rows in beside.values() for row, v in rows.items()})
            rates = bench.tune(task, methods, epochs)
        (guided,) = bench.map(bench_run.guided, [(task,)])
        runs = bench.methods(task, methods, args.seeds, rates, epochs)
        results[task] = {"rates": rates, "methods": runs, "guided": guided["rows"]}
        for name, variants in beside.items():
            own = {row: runs[method] for row, method in SAME[name].items() if method in runs}
            rated = {row: variant | {"rate": rates["tafs"]} for row, variant in variants.items()}
            results[name] = dict(sorted((own | bench.variants(task, rated, args.seeds, epochs)).items()))
    if "digits" in results and not args.quick:
        rated = {row: group | {"rate": results["digits"]["rates"]["tafs"]} for row, group in GROUPS.items()}
        results["groups"] = bench.variants("mixed", rated, args.seeds, bench.epochs("mixed", GROUPS))
        results["distillers"] = bench.distillers(args.seeds)
    return results


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASK_NAMES), choices=TASK_NAMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of all budgets of time")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--quick", action="store_true", help="digits, one seed, stored rates, no tables beside")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_methods"))
    parser.add_argument("--docs", type=Path, help="where benchmarks.md and results/ go; docs/, or of --quick the runs'")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds = ["digits"], [0]
    with Bench(args.runs, args.jobs, args.scale) as bench:
        results = measure(bench, args)
    command = "python examples/benchmarks/methods.py " + " ".join(sys.argv[1:])
    docs = args.docs or (args.runs if args.quick else DOCS)
    report.write(results, docs, command.strip(), args.seeds)
    print(f"written: {docs / 'benchmarks.md'}", flush=True)


if __name__ == "__main__":
    main()
