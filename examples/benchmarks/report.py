"""The benchmark's tables and plots from its runs: docs/benchmarks.md and docs/results/methods.*."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks import TASKS

from trl_tafs.output.markdown import table

Runs = dict[str, list[dict[str, Any]]]  # a method's name to its seeds
HEAD = """# Benchmarks

Every number on this page was measured by the command below, on the embedded pipelines.
These are toys: they rank methods at D = 64 and D = 1,536, and say nothing of SD3.5. Methods are presets
(`TAFSGRPOConfig.from_preset`); guidance is off and the groups are of one size for all, whatever their papers have.

```bash
{command}
```

{tuning}
Seeds {seeds}: the mean and, after +-, the standard deviation over seeds. Time is CPU time of one thread: an epoch
of each method was timed first, in turn, the least of several counts, and a run has as many epochs as take
{seconds} seconds. `NFE old` is the evaluations of the denoiser that an image takes to be drawn, `NFE`
those with gradient, `other` those of old or reference policies. Judged at 4 steps without guidance, by the better of
the annealed sampler and the ODE; `ODE 10` is the reward at 10 ODE steps. "At equal evaluations" is where a method has
spent as many as `tafs` in the time, or half as much time again. `base` is `tafs` at a learning rate of 1e-9: nothing
moves.
"""
LABELS = {"digits": "Digits, D = 64", "words": "Words, D = 1,536"}
COLUMNS = {
    "digits": ("reward", "held_out", "ocr", "fidelity", "diversity"),
    "words": ("reward", "held_out", "colour", "fidelity", "diversity"),
}
EXPLAINED = {
    "digits": "Accuracy by the rewarding classifier, the held-out one and the OCR model; Frechet distance (less is\n"
    "better); diversity, 1 that of real digits.",
    "words": "Held-out words: 1 - normalised edit distance by the rewarding and the older OCR engine, share of the\n"
    "asked colour, closeness to the font (more is better), spread of the pixels.",
}


def better(run: dict[str, Any]) -> dict[str, float]:
    """The judges' row at 4 steps: by the sampler that the reward prefers."""
    rows = run["rows"]
    return max((rows["annealed 4"], rows["ode 4"]), key=lambda row: row["reward"])


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation."""
    return [round(statistics.mean(values), 4), round(statistics.stdev(values), 4) if len(values) > 1 else 0.0]


def show(pair: Sequence[float]) -> str:
    """.912 +- .013."""
    mean, deviation = pair
    return f"{mean:.2f} +- {deviation:.2f}" if abs(mean) >= 1.995 else f"{mean:.3f} +- {deviation:.3f}"


def facts(runs: list[dict[str, Any]], columns: Sequence[str]) -> dict[str, list[float]]:
    """A method's columns when the time was spent."""
    judged = [better(run["at_time"]) for run in runs]
    row = {name: spread([values[name] for values in judged]) for name in columns}
    if "ode 10" in runs[0]["at_time"]["rows"]:
        row["reward_ode_10"] = spread([run["at_time"]["rows"]["ode 10"]["reward"] for run in runs])
    return row


def summarise(task: str, runs: Runs, rates: dict[str, float]) -> dict[str, dict[str, Any]]:
    """All methods of one task."""
    base = runs["tafs"][0]["seconds_per_epoch"]
    rows = {}
    for name, mine in runs.items():
        time = mine[0]["seconds_per_epoch"]
        rows[name] = {
            "rate": rates[name],
            "nfe": mine[0]["nfe"],
            "time_ratio": round(time / base, 2),
            "epochs": mine[0]["at_time"]["epochs"],
            "seconds_per_epoch": time,
            "at_time": facts(mine, COLUMNS[task]),
            "at_evaluations": {"reward": spread([run["at_evaluations"]["best"] for run in mine])},
            "seeds": [run["seed"] for run in mine],
        }
    return rows


def main_table(task: str, summary: dict[str, dict], distillers: dict[str, dict]) -> str:
    """Table 2's columns."""
    columns = [name for name in (*COLUMNS[task], "reward_ode_10") if name in summary["tafs"]["at_time"]]
    shown = ["ODE 10" if name == "reward_ode_10" else name for name in columns]
    header = ["", "NFE old", "NFE", "other", "time an epoch", "rate", *shown, "reward at equal evaluations"]
    few = min(len(row["seeds"]) for row in summary.values()) < len(summary["tafs"]["seeds"])
    header += ["seeds"] if few else []
    order = sorted(summary, key=lambda name: -summary[name]["at_time"]["reward"][0])
    rows = []
    for name in order:
        row, nfe = summary[name], summary[name]["nfe"]
        cells = [f"{nfe.get(phase, 0):g}" for phase in ("rollout", "policy", "other")]
        cells += [f"{row['time_ratio']:.2f}", f"{row['rate']:g}"]
        cells += [show(row["at_time"][column]) for column in columns]
        seeds = [", ".join(map(str, row["seeds"]))] if few else []
        rows.append([f"`{name}`", *cells, show(row["at_evaluations"]["reward"]), *seeds])
    for name, row in distillers.items():
        cells = [show(row["at_time"][column]) for column in columns]
        rows.append(
            [
                f"{name} (needs the reward's gradient)",
                "",
                "",
                "",
                "",
                f"{row['rate']:g}",
                *cells,
                "",
                *([""] if few else []),
            ]
        )
    return table(header, rows)


def variants_table(first: str, runs: Runs, columns: Sequence[str]) -> tuple[str, dict]:
    """Tables 4 and 5, and the groups'."""
    slowest = max(mine[0]["seconds_per_epoch"] for mine in runs.values())
    summary = {
        name: {"time_ratio": round(mine[0]["seconds_per_epoch"] / slowest, 2)} | facts(mine, columns)
        for name, mine in runs.items()
    }
    rows = [[name, f"{row['time_ratio']:.2f}", *(show(row[c]) for c in columns)] for name, row in summary.items()]
    return table([first, "time an epoch", *columns], rows), summary


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Reward at 4 annealed steps against time, with seed bands; the methods that learn most, and the paper's."""
    from matplotlib.figure import Figure

    tasks = [task for task in LABELS if task in results]
    figure = Figure(figsize=(6.5 * len(tasks), 4.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        runs = results[task]["methods"]
        for i, (name, mine) in enumerate(runs.items()):
            points = min(len(run["curve"]) for run in mine)
            values = [[run["curve"][k]["value"] for run in mine] for k in range(points)]
            seconds = [mine[0]["curve"][k]["epochs"] * mine[0]["seconds_per_epoch"] for k in range(points)]
            style = ("-", "--", ":")[i // 10 % 3]
            (line,) = axes.plot(seconds, [statistics.mean(v) for v in values], style, color=f"C{i % 10}", label=name)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(seconds, low, high, alpha=0.12, color=line.get_color())
        axes.set(title=LABELS[task], xlabel="CPU seconds of training", ylabel="reward, 4 annealed steps")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def plot_steps(results: dict[str, Any], path: Path, names: Sequence[str]) -> None:
    """Figure 4: the reward against inference steps, annealed and ODE; seed 0."""
    from matplotlib.figure import Figure

    tasks = [task for task in LABELS if task in results]
    figure = Figure(figsize=(6 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, name in enumerate(name for name in names if name in results[task]["methods"]):
            steps = next((run["steps"] for run in results[task]["methods"][name] if "steps" in run), {})
            for sampler, style in (("annealed", "-o"), ("ode", "--x")):
                points = [(int(k.split()[1]), v) for k, v in steps.items() if k.startswith(sampler)]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{name}, {sampler}", ms=4)
        axes.set(title=LABELS[task], xlabel="inference steps", ylabel="reward")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def correlation_table(results: dict[str, Any]) -> str:
    """Table 7."""
    rows = []
    for task in (task for task in LABELS if task in results):
        run = results[task]["methods"]["tafs"][0]
        if "correlations" in run:
            for when, found in run["correlations"].items():
                rows.append([f"{task}, {when} training", *(f"{r:.2f}" for r in found.values())])
    return table(["", *(f"R^{n} with R^4" for n in (1, 2, 3))], rows)


def tuning_sentence(results: dict[str, Any], tasks: Sequence[str]) -> str:
    """How the learning rates were chosen."""
    if all(len(set(results[task]["rates"].values())) == 1 for task in tasks):
        return "All methods at one learning rate, untuned."
    tried = " and ".join(f"{', '.join(f'{rate:g}' for rate in TASKS[task].rates)} ({task})" for task in tasks)
    return f"Each method was tuned alike: a run at each of {tried}, with a seed of its own."


def write(results: dict[str, Any], docs: Path, command: str, seeds: Sequence[int]) -> None:
    """The page, the JSON and the plots."""
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in LABELS if task in results]
    budgets = {task: results[task]["methods"]["tafs"][0]["budget"] for task in tasks}
    parts = [
        HEAD.format(
            command=command,
            seeds=", ".join(map(str, seeds)),
            seconds=" and ".join(f"{budgets[task]:g} ({task})" for task in tasks),
            tuning=tuning_sentence(results, tasks),
        )
    ]
    told: dict[str, Any] = {"command": command, "seeds": list(seeds), "presets": {}}
    told["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}
    told["versions"]["python"] = platform.python_version()
    distillers = {
        name: {"rate": mine[0]["method"]["rate"], "at_time": facts(mine, COLUMNS["digits"])}
        for name, mine in results.get("distillers", {}).items()
    }
    for task in tasks:
        summary = summarise(task, results[task]["methods"], results[task]["rates"])
        for name, row in summary.items():
            told["presets"].setdefault(name, {})[task] = row
        beside = distillers if task == "digits" else {}
        parts += [f"## {LABELS[task]}", EXPLAINED[task], main_table(task, summary, beside)]
    told["distillers"] = distillers
    plot_curves(results, folder / "methods_curves.png")
    plot_steps(results, folder / "methods_steps.png", ("tafs", "tafs_nft", "tafs_clean", "flow_grpo", "base"))
    parts += ["## Reward against time", "![reward against time](results/methods_curves.png)"]
    parts += ["## Reward against inference steps (the paper's Figure 4)"]
    parts += ["![reward against steps](results/methods_steps.png)"]
    parts += ["## Intermediate and final rewards (the paper's Table 7)"]
    parts += ["Pearson's r over the judged prompts, 4 annealed steps.", correlation_table(results)]
    for key, title, first in (
        ("table_4", "Annealed steps in training (the paper's Table 4)", "annealed steps"),
        ("table_5", "Steps whose advantages are used (the paper's Table 5), in both readings", "credit, steps"),
        ("groups", "Group sizes, among prompts of which two thirds teach nothing", "group_allocation"),
    ):
        if key in results:
            text, told[key] = variants_table(first, results[key], COLUMNS["digits"])
            parts += [f"## {title}", "Digits; `tafs` and its variants, as long.", text]
    (docs / "benchmarks.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    (folder / "methods.json").write_text(json.dumps(told, indent=1) + "\n")
