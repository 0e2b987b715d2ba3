"""Distribution matching beside the reward, on digits: from the base, and from a start that is few-step already.

    python examples/benchmarks/distribution_matching.py --part settings   # one seed of each, by noise of its own
    python examples/benchmarks/distribution_matching.py --part base       # three seeds of what won, from the base
    python examples/benchmarks/distribution_matching.py --part few_step   # the same from a few-step start
    python examples/benchmarks/distribution_matching.py --part seconds    # what an epoch takes
    python examples/benchmarks/distribution_matching.py --part page       # docs/distribution_matching.md of all that

A budget is a number of epochs that take so many CPU seconds of one thread (`SECONDS`, measured on an idle machine), so
that results don't depend on what else runs. The few-step start is built here, by distribution matching alone: a reward
that is the same for every image. Judged at 4 annealed steps, one evaluation each, on 300 images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench_run import make_trainer, train_epoch
from tasks import Digits
from torch import Tensor

from trl_tafs.output.markdown import table

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHOOSING, REPORTING = 2000, 1000  # seeds of the noise that settings are chosen by, and that is reported
CHOOSING_SEED = 100
COLUMNS = ("reward", "held_out", "ocr", "frechet", "diversity", "saturated")
POINTS = 4  # at which a run from a few-step start is judged
BUDGETS = {"base": 16.0, "start": 40.0, "few_step": 20.0}  # CPU seconds of one thread


def method(preset: str, rate: float, seconds: float, **options: Any) -> dict[str, Any]:
    """One method as `bench_run` takes it, with the CPU seconds that its epoch takes."""
    return {"preset": preset, "rate": rate, "seconds": seconds, "options": options}


SQRT = {"train_log_prob_reduction": "sqrt", "beta": 0.2}  # the term weighs 1 / 8 as much beside it, at D = 64
BESIDE = {"dm_weight": 1.0, "dm_rows": "final", "dm_guidance_scale": 2.0}
TWICE = {"train_batch_size": 96, "train_updates_per_epoch": 2}
WON = {"train_batch_size": 48, "dm_fake_learning_rate": 1e-2}  # of `SETTINGS`: the preset's four updates an epoch
METHODS = {"tafs": method("tafs", 3e-3, 0.80), "tafs_dm": method("tafs_dm", 3e-3, 1.2, **WON)}
ADAPTIVE = method("tafs_dm", 3e-3, 1.2)
START = method("tafs_dm", 3e-3, 1.1, **WON | {"beta": 0.0})


def one(preset: str, rate: float, seconds: float, **options: Any) -> dict[str, Any]:
    """A method with one optimizer step an epoch, and the fake score at the policy's rate, unless told otherwise.

    `tafs_dm` is as it was when these rows were run, with clean weights.
    """
    clean = {"train_level_weighting": "clean", "train_clip_range": 0.01, "beta": 0.02, "dm_weight": 0.25}
    first = {"train_updates_per_epoch": 1, "dm_fake_learning_rate": rate} | (clean if preset == "tafs_dm" else {})
    return method(preset, rate, seconds, **first | options)


# One seed each; a later one differs from the first in what its name says.
SETTINGS = {
    "one optimizer step an epoch": one("tafs_dm", 3e-3, 1.11),
    "two optimizer steps an epoch, fake rate 1e-2": one("tafs_dm", 3e-3, 1.2, dm_fake_learning_rate=1e-2, **TWICE),
    "two optimizer steps an epoch, fake rate 1e-2, weight .125": one(
        "tafs_dm", 3e-3, 1.2, dm_fake_learning_rate=1e-2, dm_weight=0.125, **TWICE
    ),
    "four optimizer steps an epoch, fake rate 1e-2": one("tafs_dm", 3e-3, 1.2, **WON | {"train_updates_per_epoch": 4}),
    "adaptive weights, weight .5": ADAPTIVE | {"options": WON | {"dm_weight": 0.5}},
    "adaptive weights, weight 1": ADAPTIVE | {"options": WON | {"dm_weight": 1.0}},
    "adaptive weights, weight 2": ADAPTIVE | {"options": WON | {"dm_weight": 2.0}},
    "weight .125, fake rate 1e-2": one("tafs_dm", 3e-3, 1.11, dm_weight=0.125, dm_fake_learning_rate=1e-2),
    "two optimizer steps an epoch": one("tafs_dm", 3e-3, 1.2, **TWICE),
    "fake rate 1e-2": one("tafs_dm", 3e-3, 1.11, dm_fake_learning_rate=1e-2),
    "weight .125": one("tafs_dm", 3e-3, 1.11, dm_weight=0.125),
    "weight .5": one("tafs_dm", 3e-3, 1.11, dm_weight=0.5),
    "weight 1": one("tafs_dm", 3e-3, 1.11, dm_weight=1.0),
    "rate 1e-3": one("tafs_dm", 1e-3, 1.11),
    "rate 6e-3": one("tafs_dm", 6e-3, 1.11),
    "guidance 1": one("tafs_dm", 3e-3, 1.0, dm_guidance_scale=1.0),
    "guidance 2": one("tafs_dm", 3e-3, 1.11, dm_guidance_scale=2.0),
    "guidance 4": one("tafs_dm", 3e-3, 1.11, dm_guidance_scale=4.0),
    "2 fake updates": one("tafs_dm", 3e-3, 1.24, dm_fake_updates=2),
    "5 fake updates": one("tafs_dm", 3e-3, 1.64, dm_fake_updates=5),
    "levels shifted by 3": one("tafs_dm", 3e-3, 1.11, dm_level_shift=3.0),
    "trained rows": one("tafs_dm", 3e-3, 1.6, dm_rows="trained"),
    "tafs_nft, weight 1": one("tafs_nft", 3e-3, 1.11, dm_weight=1.0, dm_rows="final"),
    "tafs_annealed, weight 1": one("tafs_annealed", 3e-3, 1.06, dm_weight=1.0, dm_rows="final"),
    "sqrt units, weight 1": one("tafs_dm", 3e-3, 1.11, dm_weight=1.0, **SQRT),
    "sqrt units, weight 1, guidance 2": one("tafs_dm", 3e-3, 1.11, dm_weight=1.0, dm_guidance_scale=2.0, **SQRT),
    "sqrt units, weight 1, guidance 2, no KL": one(
        "tafs_dm", 3e-3, 1.0, dm_weight=1.0, dm_guidance_scale=2.0, **SQRT | {"beta": 0.0}
    ),
    "sqrt units, weight 1, guidance 2, no KL, trained rows": one(
        "tafs_dm", 3e-3, 1.49, dm_weight=1.0, dm_guidance_scale=2.0, dm_rows="trained", **SQRT | {"beta": 0.0}
    ),
    "tafs_annealed, weight 1, guidance 2": one("tafs_annealed", 3e-3, 1.06, **BESIDE),
    "tafs_annealed, weight 1, guidance 2, trained rows": one(
        "tafs_annealed", 3e-3, 1.45, **BESIDE | {"dm_rows": "trained"}
    ),
    "tafs_nft, weight 1, guidance 2, no KL": one("tafs_nft", 3e-3, 1.0, beta=0.0, **BESIDE),
    "tafs_nft, weight 1, guidance 2, no KL, trained rows": one(
        "tafs_nft", 3e-3, 1.45, beta=0.0, **BESIDE | {"dm_rows": "trained"}
    ),
    "without": METHODS["tafs"],
}


def judged(task: Digits, pipeline: Any, noise: int) -> dict[str, float]:
    """All judges on images from one noise."""
    images = task.images(pipeline, "annealed", 4, seed=noise)
    values = task.judge(images) | {"frechet": task.frechet(images), "saturated": task.saturated(images)}
    return {name: round(values[name], 4) for name in COLUMNS}


def nothing(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A reward that is the same for every image: no advantage, so that distribution matching is alone."""
    return torch.zeros(len(images))


class Alone(Digits):
    """Digits without a reward."""

    def rewards(self) -> dict[str, Any]:
        """One that teaches nothing."""
        return {"nothing": nothing}


class Fused(Digits):
    """Digits on a base that is few-step already: the start's LoRA is in its weights, without the weights before it."""

    folder: str

    def pipeline(self) -> Any:
        """The base with the LoRA fused into it."""
        pipeline = super().pipeline()
        pipeline.load_lora_weights(self.folder)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        return pipeline


def train(
    task: Digits,
    method: dict[str, Any],
    seed: int,
    budget: str,
    noise: int,
    points: int = 1,
    keep: Callable[[Any], None] = lambda trainer: None,
) -> dict[str, Any]:
    """Train for the epochs of a budget, and judge before, and at so many points on the way; `keep` gets the trainer."""
    epochs = round(BUDGETS[budget] / method["seconds"])
    looks = {round(epochs * k / points) for k in range(1, points + 1)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, method, seed, folder)
        curve = [{"epochs": 0} | judged(task, trainer.sd_pipeline, noise)]
        for epoch in range(1, epochs + 1):
            train_epoch(trainer)
            if epoch in looks:
                curve.append({"epochs": epoch} | judged(task, trainer.sd_pipeline, noise))
        keep(trainer)
    return {"method": method, "seed": seed, "epochs": epochs, "curve": curve}


def settings(names: list[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each setting, one seed."""
    for name in names:
        yield (name,), train(Digits(), SETTINGS[name], CHOOSING_SEED, "base", CHOOSING)


def base(seeds: list[int], methods: list[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What won, and the same without it, from the base."""
    for seed in seeds:
        for name in methods:
            yield (name, str(seed)), train(Digits(), METHODS[name], seed, "base", REPORTING)


def few_step(seeds: list[int], methods: list[str], kinds: list[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """From a few-step start: "continued", its LoRA above the base; or "fused", in a base that has no other weights."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:

            def keep(trainer: Any, folder: str = folder) -> None:
                trainer.policy.publish(folder)

            yield ("start", str(seed)), train(Alone(), START, seed, "start", REPORTING, keep=keep)
            for kind in kinds:
                task = Fused() if kind == "fused" else Digits()
                if kind == "fused":
                    task.folder = folder
                for name in methods:
                    chosen = METHODS[name]
                    more = {} if kind == "fused" else {"adapter_name_or_path": folder}
                    begun = chosen | {"options": chosen["options"] | more}
                    result = train(task, begun, seed, "few_step", REPORTING, POINTS)
                    yield (kind, name, str(seed)), result | {"method": chosen}


def seconds() -> Iterator[tuple[tuple[str, ...], Any]]:
    """CPU seconds of an epoch of each setting, the least of several, measured in turn."""
    least: dict[str, float] = {}
    for name in [*SETTINGS] * 3:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(Digits(), SETTINGS[name], 0, folder)
            train_epoch(trainer)
            for _ in range(2):
                start = time.process_time()
                train_epoch(trainer)
                least[name] = min(least.get(name, float("inf")), time.process_time() - start)
    for name, value in least.items():
        yield (name,), round(value, 3)


# The page -----------------------------------------------------------------------------------------------------


def told(row: dict[str, float]) -> list[str]:
    """A row's numbers."""
    return [f"{row[name]:.3f}" if name != "frechet" else f"{row[name]:.2f}" for name in COLUMNS]


def mean_row(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of several seeds' rows."""
    return {name: mean(row[name] for row in rows) for name in COLUMNS}


def page(results: dict[str, Any]) -> str:
    """The tables, each with the command that made it."""
    command = "`python examples/benchmarks/distribution_matching.py --part {}`"
    parts = ["<!-- tables: begin -->"]
    if found := results.get("base"):
        rows = []
        for name, runs in found.items():
            ends = [run["curve"][-1] for run in runs.values()]
            each = ", ".join(f"{end['reward']:.3f} / {end['frechet']:.2f}" for end in ends)
            rows.append([f"`{name}`", str(next(iter(runs.values()))["epochs"]), *told(mean_row(ends)), each])
        starts = [run["curve"][0] for run in next(iter(found.values())).values()]
        rows.insert(0, ["the base", "0", *told(mean_row(starts)), ""])
        header = ["16 CPU s from the base", "epochs", *COLUMNS, "by seed: reward / frechet"]
        parts += [table(header, rows), command.format("base")]
    if found := results.get("few_step"):
        rows = []
        for kind, methods in found.items():
            runs = {"": methods} if kind == "start" else methods
            for name, seeds in runs.items():
                curves = [run["curve"] for run in seeds.values()]
                for points in zip(*curves, strict=True):
                    place = "distribution matching alone" if kind == "start" else f"{kind}, `{name}`"
                    rows.append([place, str(points[0]["epochs"]), *told(mean_row(list(points)))])
        parts += [table(["from a few-step start, 20 CPU s", "epochs", *COLUMNS], rows), command.format("few_step")]
    if found := results.get("settings"):
        rows = [[name, str(run["epochs"]), *told(run["curve"][-1])] for name, run in found.items()]
        parts += [table(["one seed each, 16 CPU s", "epochs", *COLUMNS], rows), command.format("settings")]
    return "\n\n".join([*parts, "<!-- tables: end -->"])


def write_page(results: dict[str, Any], path: Path) -> None:
    """Put the tables between the page's two marks."""
    before, _, rest = path.read_text().partition("<!-- tables: begin -->")
    path.write_text(before + page(results) + rest.partition("<!-- tables: end -->")[2])


def main() -> None:
    """Run one part, and keep each result as it is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["settings", "base", "few_step", "seconds", "page"], default="base")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kinds", nargs="+", default=["continued", "fused"], choices=["continued", "fused"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    file = args.docs / "results" / "distribution_matching.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    makers = {
        "settings": lambda: settings(args.settings),
        "base": lambda: base(args.seeds, args.methods),
        "few_step": lambda: few_step(args.seeds, args.methods, args.kinds),
        "seconds": seconds,
        "page": lambda: iter(()),
    }
    for place, result in makers[args.part]():
        at = results.setdefault(args.part, {})
        for name in place[:-1]:
            at = at.setdefault(name, {})
        at[place[-1]] = result
        print(args.part, *place, result["curve"][-1] if isinstance(result, dict) else result, flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, args.docs / "distribution_matching.md")


if __name__ == "__main__":
    main()
