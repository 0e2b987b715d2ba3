"""Which objective learns, holds and keeps at which size: the runs behind docs/learning.md and the default.

    python examples/benchmarks/objectives.py --jobs 2               # the table: each setting at its best rate
    python examples/benchmarks/objectives.py --part brake --settings tafs   # over rates, and four times as long
    python examples/benchmarks/objectives.py --part updates         # 4 and 16 optimizer steps an epoch, and what holds
    python examples/benchmarks/objectives.py --part spread          # how the log-ratio is spread, by D
    python examples/benchmarks/objectives.py --part seconds         # what an epoch of each setting takes

Three sizes: digits (D = 64), words (1,536), large words (4,320). The budget is a number of epochs that take about
equally long, so that results don't depend on what else runs. A rate is chosen by a seed, prompts and noise of its own;
reported are three seeds at it, each at 2, 4 and 8 annealed steps. What was run already is read from `--runs`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_run import epoch_seconds, make_trainer, train_epoch
from tasks import TASKS, Task
from torch import Tensor

from trl_tafs import TAFSGRPOTrainer
from trl_tafs.method.kernels import clean_estimate
from trl_tafs.method.losses import matching_weight

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "objectives.json"
SIZES = {"digits": 64, "words": 1536, "large": 4320}  # D
RATES = {"digits": (1e-3, 3e-3, 1e-2), "words": (1e-3, 3e-3), "large": (1e-3, 2e-3, 3e-3)}
BRAKE_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
STEPS = (2, 4, 8)
CHOICE_SEED, CHOICE_NOISE = 100, 2000
NOISE = 1000
AVERAGE = {"train_use_ema": True, "train_ema_decay": 0.9}
CLEAN = {"train_level_weighting": "clean", "train_clip_range": 0.01}
SETTINGS: dict[str, dict[str, Any]] = {
    "tafs": {"preset": "tafs", "options": {}},
    "tafs, no KL": {"preset": "tafs", "options": {"beta": 0.0}},
    "clean weights, beta .01": {"preset": "tafs", "options": {**CLEAN, "beta": 0.01}},
    "clean weights, beta .02": {"preset": "tafs", "options": {**CLEAN, "beta": 0.02}},
    "clean weights, beta .05": {"preset": "tafs", "options": {**CLEAN, "beta": 0.05}},
    "clean weights, no KL": {"preset": "tafs", "options": {**CLEAN, "beta": 0.0}},
    "annealed": {"preset": "tafs_annealed", "options": {}},
    "annealed, KL": {"preset": "tafs_annealed", "options": {"beta": 0.2}},
    "forward, final": {"preset": "tafs_nft", "options": {}},
    "forward, final, no KL": {"preset": "tafs_nft", "options": {"beta": 0.0}},
    "forward, every": {"preset": "tafs_nft_stepwise", "options": {}},
    "forward, every, no KL": {"preset": "tafs_nft_stepwise", "options": {"beta": 0.0}},
}
HOLDS: dict[str, dict[str, Any]] = {  # what holds the ratio, with several optimizer steps an epoch
    "tafs": {"preset": "tafs", "options": {}},
    "tafs, centred": {"preset": "tafs", "options": {"train_center_ratio": True}},
    "tafs, KL limit": {"preset": "tafs", "options": {"train_kl_limit": 1e-3}},
    "annealed": {"preset": "tafs_annealed", "options": {}},
    "annealed, centred": {"preset": "tafs_annealed", "options": {"train_center_ratio": True}},
    "annealed, KL limit": {"preset": "tafs_annealed", "options": {"train_kl_limit": 1e-4}},
}
UPDATE_EPOCHS = {"digits": 12, "words": 8, "large": 6}
UPDATE_RATE = 1e-3
TUNED_AS = {  # whose best rate a setting has, where it isn't tried itself
    "tafs, no KL": "tafs",
    "clean weights, beta .02": "clean weights, beta .01",
    "clean weights, beta .05": "clean weights, beta .01",
    "clean weights, no KL": "clean weights, beta .01",
    "forward, final, no KL": "forward, final",
    "forward, every": "forward, final",
    "forward, every, no KL": "forward, final",
}
# Epochs of about equal CPU time, by `--part seconds`: a reference costs a quarter, an OCR of every step more than that
WITH_KL = ("tafs", "clean weights, beta .01", "clean weights, beta .02", "clean weights, beta .05", "annealed, KL")
WITHOUT_KL = ("tafs, no KL", "clean weights, no KL")
EPOCHS: dict[str, dict[str, int]] = {
    "digits": dict.fromkeys(WITH_KL, 16)
    | dict.fromkeys(WITHOUT_KL, 19)
    | {"annealed": 18, "forward, final": 17, "forward, final, no KL": 20}
    | {"forward, every": 15, "forward, every, no KL": 17},
    "words": dict.fromkeys(WITH_KL, 16)
    | dict.fromkeys(WITHOUT_KL, 18)
    | {"annealed": 18, "forward, final": 26, "forward, final, no KL": 29}
    | {"forward, every": 16, "forward, every, no KL": 18},
    "large": dict.fromkeys(WITH_KL, 14)
    | dict.fromkeys(WITHOUT_KL, 16)
    | {"annealed": 16, "forward, final": 20, "forward, final, no KL": 23}
    | {"forward, every": 14, "forward, every, no KL": 16},
}


def method(task: str, setting: dict[str, Any], rate: float) -> dict[str, Any]:
    """A method of `bench_run` at a rate; on words its average is what is judged, as in words_ocr.py."""
    options = {} if task == "digits" else AVERAGE
    return {"preset": setting["preset"], "options": options | setting["options"], "rate": rate}


def row(task: Task, pipeline: Any, steps: int) -> dict[str, float]:
    """All judges on one number of annealed steps."""
    images = task.images(pipeline, "annealed", steps, seed=NOISE)
    found = task.judge(images) | {"frechet": task.frechet(images), "saturated": task.saturated(images)}
    return {name: round(value, 4) for name, value in found.items()}


def run(task_name: str, setting: dict[str, Any], rate: float, seed: int, epochs: tuple[int, ...], full: bool) -> dict:
    """Train; after each number of `epochs` judge by all, or where not `full` by what a rate is chosen by."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = TASKS[task_name]()
    result: dict[str, Any] = {"task": task_name, "setting": setting, "rate": rate, "seed": seed, "at": {}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, method(task_name, setting, rate), seed, folder)
        while trainer.progress.epoch < epochs[-1]:
            train_epoch(trainer)
            if trainer.progress.epoch not in epochs:
                continue
            with trainer.policy.averaged(), torch.no_grad():
                if full:
                    found = {str(n): row(task, trainer.sd_pipeline, n) for n in STEPS}
                else:
                    prompts = task.choice_prompts
                    images = task.images(trainer.sd_pipeline, "annealed", 4, prompts=prompts, seed=CHOICE_NOISE)
                    found = {"choice": round(task.quick(images, prompts), 4)}
            result["at"][str(trainer.progress.epoch)] = found
        result["updates"] = trainer.progress.global_step
        result["clipped"] = clipped_shares(Path(folder) / "metrics.jsonl")
    return result


def clipped_shares(log: Path) -> dict[str, float]:
    """Of all actions of a run, those without a gradient for the clip or the limit, by the advantage's sign."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = [line for line in lines if "clipfrac_positive" in line]
    names = ("clipfrac_positive", "clipfrac_negative") if found else ()
    return {name: round(statistics.mean(line[name] for line in found), 4) for name in names}


def base(task_name: str) -> dict[str, Any]:
    """The base by the same judges, and guided: at 2, 4 and 8 annealed steps."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = TASKS[task_name]()
    pipeline = task.pipeline()
    return {str(n): row(task, pipeline, n) for n in STEPS}


class Runs:
    """Jobs side by side, each in a process of its own; what was made before is read."""

    def __init__(self, folder: Path, jobs: int) -> None:
        """Keep results in `folder`."""
        self.folder, self.jobs = folder, jobs
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, calls: Iterable[tuple]) -> list[Any]:
        """Return what each call, (function, *arguments), gives."""
        calls = list(calls)
        paths = [self._path(call) for call in calls]
        missing = [(call, path) for call, path in zip(calls, paths, strict=True) if not path.exists()]
        with get_context("spawn").Pool(self.jobs, maxtasksperchild=1) as pool:
            for done, path in enumerate(pool.imap_unordered(_kept, missing, chunksize=1), 1):
                print(f"{done}/{len(missing)} {path}", flush=True)
        return [json.loads(path.read_text()) for path in paths]

    def _path(self, call: tuple) -> Path:
        function, *arguments = call
        text = json.dumps([function.__name__, *arguments], sort_keys=True)
        return self.folder / f"{function.__name__}_{arguments[0]}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _kept(job: tuple[tuple, Path]) -> Path:
    (function, *arguments), path = job
    found = function(*arguments)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(found))
    written.rename(path)
    return path


def seconds(runs: Runs, tasks: list[str], settings: dict[str, dict]) -> dict[str, Any]:
    """What an epoch of each setting takes, and all of its epochs, in CPU seconds of one thread; measured in turn."""
    told = {}
    for task in tasks:
        methods = {name: method(task, setting, 1e-5) for name, setting in settings.items()}
        found = runs([(epoch_seconds, task, methods, 2, 2)])[0]["seconds"]
        told[task] = {n: {"epoch": found[n], "run": round(found[n] * EPOCHS[task][n], 1)} for n in settings}
        print(task, told[task], flush=True)
    return told


def best_rates(runs: Runs, task: str, names: list[str]) -> dict[str, float]:
    """Each setting's best rate, by a seed, prompts and noise that aren't reported."""
    leaders = list(dict.fromkeys(TUNED_AS.get(name, name) for name in names))
    tried = [(name, rate) for name in leaders for rate in RATES[task]]
    calls = [(run, task, SETTINGS[n], rate, CHOICE_SEED, (EPOCHS[task][n],), False) for n, rate in tried]
    found = runs(calls)
    value = {pair: next(iter(item["at"].values()))["choice"] for pair, item in zip(tried, found, strict=True)}
    best = {name: max(RATES[task], key=lambda rate: value[name, rate]) for name in leaders}
    print(task, value, flush=True)
    return {name: best[TUNED_AS.get(name, name)] for name in names}


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The means of several seeds' rows, with each seed's reward."""
    mean = {name: round(statistics.mean(item[name] for item in rows), 4) for name in rows[0]}
    return mean | {"seeds": [item["reward"] for item in rows]}


def table(runs: Runs, tasks: list[str], names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Each setting at its best rate on each task, at each number of steps."""
    told: dict[str, Any] = {}
    for task in tasks:
        rates = best_rates(runs, task, names)
        epochs = EPOCHS[task]
        calls = [(run, task, SETTINGS[n], rates[n], seed, (epochs[n],), True) for n in names for seed in seeds]
        found = iter(runs(calls))
        told[task] = {"base": runs([(base, task)])[0]}
        for name in names:
            mine = [next(found) for _ in seeds]
            rows = {str(n): [next(iter(item["at"].values()))[str(n)] for item in mine] for n in STEPS}
            facts = {"rate": rates[name], "epochs": epochs[name], "updates": mine[0]["updates"]}
            told[task][name] = facts | {n: summary(items) for n, items in rows.items()}
            print(task, name, told[task][name]["4"], facts, flush=True)
    return told


def brake(runs: Runs, tasks: list[str], names: list[str], rates: list[float], seeds: list[int]) -> dict[str, Any]:
    """Settings over rates, at the number of epochs that `tafs` has and at four times it."""
    told: dict[str, Any] = {}
    for task in tasks:
        count, tried = EPOCHS[task]["tafs"], [(name, rate) for name in names for rate in rates]
        calls = [(run, task, SETTINGS[n], rate, s, (count, 4 * count), True) for n, rate in tried for s in seeds]
        found = iter(runs(calls))
        told[task] = {"base": runs([(base, task)])[0]}
        for name, rate in tried:
            mine, row = [next(found)["at"] for _ in seeds], f"{name}, {rate:g}"
            told[task][row] = {
                f"{times} x": {str(n): summary([item[str(times * count)][str(n)] for item in mine]) for n in STEPS}
                for times in (1, 4)
            }
            print(task, row, {k: v["4"] for k, v in told[task][row].items()}, flush=True)
    return told


def updates(runs: Runs, tasks: list[str], counts: tuple[int, ...], seeds: list[int]) -> dict[str, Any]:
    """What holds the ratio, with several optimizer steps an epoch, at one rate and number of epochs."""
    told: dict[str, Any] = {}
    for task in tasks:
        images = {"digits": 192}.get(task, 96)
        tried = [(name, count, seed) for name in HOLDS for count in counts for seed in seeds]
        calls = []
        for name, count, seed in tried:
            sizes = {"train_batch_size": images // count, "train_gradient_accumulation_steps": 1}
            setting = {"preset": HOLDS[name]["preset"], "options": HOLDS[name]["options"] | sizes}
            calls.append((run, task, setting, UPDATE_RATE, seed, (UPDATE_EPOCHS[task],), True))
        told[task] = {}
        for (name, count, _), found in zip(tried, runs(calls), strict=True):
            rows = told[task].setdefault(f"{name}, {count} updates", {"rows": [], "clipped": []})
            rows["rows"].append(next(iter(found["at"].values()))["4"])
            rows["clipped"].append(found["clipped"])
        for name, kept in told[task].items():
            kept |= {"4": summary(kept.pop("rows"))}
            print(task, name, kept, flush=True)
    return told


@torch.no_grad()
def estimates(trainer: TAFSGRPOTrainer, items: Any, prompts: list[str]) -> Tensor:
    """The policy's clean estimates at all items, (T, D)."""
    found = []
    for rows in torch.arange(len(items)).split(96):
        part, conditioning = items[rows], trainer.encode([prompts[row] for row in rows])
        v = trainer.policy.velocity(part.state, part.level, conditioning).float()
        found.append(clean_estimate(part.state.float(), v, part.level).flatten(1))
    return torch.cat(found)


def spread(task_name: str, preset: str, updates: int = 4) -> dict[str, float]:
    """How the log-ratio is spread after so many optimizer steps on one epoch's images, at a rate of 1e-3.

    The change of an action's mean is `dm`, the action's distance from the old mean `d`, both in the density's
    deviations: the log-ratio is `<d, dm> - |dm|^2 / 2`. Returned: the deviation of the cosine of the two over actions,
    that of `<d, dm> / D`, and the mean of `|dm|^2 / (2 D)`, its drift.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(TASKS[task_name](), {"preset": preset, "options": {}, "rate": 1e-3}, 0, folder)
        for _ in range(3):
            train_epoch(trainer)
        experience = trainer.collector.collect(3, 3)
        advantages = trainer.algorithm.credit(experience.rewards, experience.prompts, 3).advantages
        items = trainer.updater.minibatch_items(experience.batches, experience.local(advantages), 3)
        drawn = [prompt for batch in experience.batches for prompt in batch.prompts.prompts]
        prompts = [drawn[image] for image in items.sample.tolist()]
        old = estimates(trainer, items, prompts)
        for _ in range(updates):
            list(trainer.updater.update(experience, advantages, 3))
        change = estimates(trainer, items, prompts) - old
    if preset == "tafs":
        weight = matching_weight(old, items.clean.flatten(1), items.level, trainer.config.level_weighting).sqrt()
        distance, change = weight * (items.clean.flatten(1) - old), weight * change
    else:  # the action is (1 - s') xhat + s' eps
        after = items.next_level[:, None]
        distance = (items.action.flatten(1).float() - (1 - after) * old) / after
        change = change * (1 - after) / after
    product = (distance * change).mean(1)
    lengths = distance.square().mean(1).sqrt() * change.square().mean(1).sqrt()
    told = {"cosine": (product / lengths).std(), "log_ratio": product.std(), "drift": change.square().mean() / 2}
    return {name: round(value.item(), 5) for name, value in told.items()}


def spreads(runs: Runs, tasks: list[str]) -> dict[str, Any]:
    """`spread` of the action that has structure and of the one that is noise."""
    told = {task: {name: runs([(spread, task, name)])[0] for name in ("tafs", "tafs_annealed")} for task in tasks}
    print(json.dumps(told, indent=1), flush=True)
    return told


def main() -> None:
    """Run what is missing; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["table", "brake", "updates", "spread", "seconds"], default="table")
    parser.add_argument("--tasks", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(BRAKE_RATES), help="of the brake's table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = Runs(args.runs, args.jobs)
    if args.part == "table":
        told = table(runs, args.tasks, args.settings, args.seeds)
    elif args.part == "brake":
        told = brake(runs, args.tasks, args.settings, args.rates, args.seeds)
    elif args.part == "updates":
        told = updates(runs, args.tasks, (4, 16), args.seeds)
    elif args.part == "spread":
        told = spreads(runs, args.tasks)
    else:
        told = seconds(runs, args.tasks, {name: SETTINGS[name] for name in args.settings})
    kept = json.loads(args.results.read_text()) if args.results.exists() else {}
    command = "python examples/benchmarks/objectives.py " + shlex.join(sys.argv[1:])
    part = kept.setdefault(args.part, {"commands": [], "tasks": {}})
    part["commands"].append(command.strip())
    for task, rows in told.items():
        part["tasks"].setdefault(task, {}).update(rows)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
