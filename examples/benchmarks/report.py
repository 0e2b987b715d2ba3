"""The benchmark's tables and plots from its runs: docs/benchmarks.md and docs/results/methods.*."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from intervals import Seeds, difference, interval, verdict
from tasks import TASKS

from trl_tafs.output.markdown import table

Runs = dict[str, list[dict[str, Any]]]  # a method's name to its seeds
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
OPENING = "# Benchmarks\n"
HEAD = """## How it was measured

```bash
{command}
```

{tuning} Seeds {seeds}. Time is CPU time of one thread: an epoch of each method was timed first, in turn, the least of
several counts, and a run has as many epochs as take {seconds} seconds. Methods are presets
(`TAFSGRPOConfig.from_preset`); guidance is off and the groups are of one size for all, whatever their papers have, and
each takes one optimizer step an epoch, unless its name says how many: then as many as its source. Judged without
guidance at 2, 4 and 8 steps, by the better of the annealed sampler and the ODE. After the mean its 95% interval, of the
seeds' variance and of the judged images', and each seed's value. "At equal evaluations" is where a method has spent as
many as `tafs` in the time, or half as much time again. `base` is `tafs` at a learning rate of 1e-9: nothing moves.
Guided rows are the untrained base: the better sampler and the best of five scales, by the prompts and the noise that
rates are chosen by.
"""
LABELS = {"digits": "Digits, D = 64", "words": "Words, D = 1,536", "scenes": "Scenes, D = 3,072"}
COLUMNS = {
    "digits": ("held_out", "ocr", "fidelity", "diversity"),
    "words": ("held_out", "colour", "fidelity", "diversity"),
    "scenes": ("held_out", "preference", "fidelity", "diversity"),
}
EXPLAINED = {
    "digits": "Accuracy by the rewarding classifier, the held-out one and the OCR model; Frechet distance (less is\n"
    "better); diversity, 1 that of real digits.",
    "words": "Held-out words: 1 - normalised edit distance by the rewarding and the older OCR engine, share of the\n"
    "asked colour, closeness to the font (more is better), spread of the pixels.",
    "scenes": "Held-out combinations: GenEval's strict score by the rewarding detector and by the second; a\n"
    "preference that no method was trained on here; Frechet distance of cells' colours (less is better);\n"
    "diversity, 1 that of true scenes.",
}
IDEAS = {  # of the paper, and ours: what is compared with what
    "few steps (4 for 10)": (("flow_sde, 4 steps", "flow_grpo"), ("flow_cps, 4 steps", "flow_cps")),
    "annealing instead of an SDE": (
        ("tafs", "tafs_without_annealing"),
        ("tafs_annealed", "tafs_annealed, flow_sde"),
    ),
    "a reward for every step": (
        ("tafs", "tafs_without_step_advantage"),
        ("tafs_annealed", "tafs_annealed, terminal credit"),
        ("flow_cps, 4 steps, step credit", "flow_cps, 4 steps"),
    ),
    "matching the next clean image": (("tafs", "tafs_annealed"), ("tafs", "paper")),
}


def better(run: dict[str, Any], steps: int = 4) -> dict[str, Any]:
    """The judges' row at so many steps: by the sampler that the reward prefers."""
    rows = run["at_time"]["rows"]
    return max((rows[f"annealed {steps}"], rows[f"ode {steps}"]), key=lambda row: row["reward"])


def values(runs: Sequence[dict[str, Any]], steps: int = 4) -> Seeds:
    """The reward of each judged image, for each seed."""
    return [better(run, steps)["values"] for run in runs]


def short(value: float) -> str:
    """.912, or 13.2."""
    return f"{value:.3f}".removeprefix("0") if abs(value) < 2 else f"{value:.2f}"


def told(seeds: Seeds) -> str:
    """.912 ± .013 (.905 .912 .919)."""
    found = interval(seeds)
    each = " ".join(short(statistics.mean(mine)) for mine in seeds)
    return f"{short(found.mean)} ± {short(found.half)}" + (f" ({each})" if len(seeds) > 1 else "")


def average(runs: Sequence[dict[str, Any]], column: str, steps: int = 4) -> float:
    """A column's mean over seeds."""
    return statistics.mean(better(run, steps)[column] for run in runs)


def facts(task: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON has of a method: each seed's figures at each number of steps."""
    columns = ("reward", *COLUMNS[task])
    return {str(steps): {name: [better(run, steps)[name] for run in runs] for name in columns} for steps in (2, 4, 8)}


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
            "updates": mine[0]["at_time"]["updates"],
            "seconds_per_epoch": time,
            "at_time": facts(task, mine),
            "interval": [round(value, 4) for value in interval(values(mine))],
            "at_evaluations": [run["at_evaluations"]["best"] for run in mine],
            "seeds": [run["seed"] for run in mine],
        }
    return rows


def reward_table(task: str, runs: Runs, guided: dict[str, dict], distillers: Runs) -> str:
    """The rewards, the best first; then the guided base, and what needs the reward's gradient."""
    columns = COLUMNS[task]
    rows = []
    for name in sorted(runs, key=lambda name: -average(runs[name], "reward")):
        mine = runs[name]
        cells = [told(values(mine)), *(short(average(mine, column)) for column in columns)]
        cells += [short(average(mine, "reward", steps)) for steps in (2, 8)]
        rows.append([f"`{name}`", *cells, short(statistics.mean(run["at_evaluations"]["best"] for run in mine))])
    for steps, row in guided.items():
        how = (
            f"base, {steps} guided {row['sampler']} steps, scale {row['guidance']:g}: {row['evaluations']} evaluations"
        )
        rows.append([how, told([row["values"]]), *(short(row[column]) for column in columns), "", "", ""])
    for name, mine in distillers.items():
        cells = [told(values(mine)), *(short(average(mine, column)) for column in columns)]
        cells += [short(average(mine, "reward", steps)) for steps in (2, 8)]
        rows.append([f"{name} (needs the reward's gradient)", *cells, ""])
    header = ["", "reward, 4 steps", *columns, "2 steps", "8 steps", "at equal evaluations"]
    return table(header, rows)


def cost_table(summary: dict[str, dict]) -> str:
    """What an image and an epoch cost."""
    rows = []
    for name, row in summary.items():
        cells = [f"{row['nfe'].get(phase, 0):g}" for phase in ("rollout", "policy", "other", "decodes")]
        cells += [str(row["epochs"]), str(row["updates"]), f"{row['time_ratio']:.2f}", f"{row['rate']:g}"]
        rows.append([f"`{name}`", *cells])
    header = ["", "NFE old", "NFE", "other", "decodes", "epochs", "updates", "time an epoch", "rate"]
    return table(header, rows)


def ideas_table(results: dict[str, Any], tasks: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Each idea by what has it and what lacks it, on each task."""
    rows, found = [], []
    for idea, pairs in IDEAS.items():
        for with_it, without in pairs:
            cells = []
            for task in tasks:
                runs = results[task]["methods"]
                if with_it in runs and without in runs:
                    gain = difference(values(runs[with_it]), values(runs[without]))
                    cells.append(f"{gain.mean:+.3f} ± {gain.half:.3f}: {verdict(gain)}")
                    fact = {"idea": idea, "with": with_it, "without": without, "task": task}
                    found.append(fact | {"gain": round(gain.mean, 4), "half": round(gain.half, 4)})
                else:
                    cells.append("")
            if any(cells):
                rows.append([idea, f"`{with_it}` - `{without}`", *cells])
    return table(["idea", "difference of", *(LABELS[task] for task in tasks)], rows), found


def variants_table(first: str, runs: Runs) -> tuple[str, dict]:
    """Tables 4 and 5, and the groups'."""
    slowest = max(mine[0]["seconds_per_epoch"] for mine in runs.values())
    columns = COLUMNS["digits"]
    rows, summary = [], {}
    for name, mine in runs.items():
        ratio = round(mine[0]["seconds_per_epoch"] / slowest, 2)
        summary[name] = {"time_ratio": ratio, "at_time": facts("digits", mine)}
        cells = [told(values(mine)), *(short(average(mine, column)) for column in columns)]
        rows.append([name, f"{ratio:.2f}", *cells])
    return table([first, "time an epoch", "reward, 4 steps", *columns], rows), summary


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Reward at 4 annealed steps against time, with seed bands."""
    from matplotlib.figure import Figure

    tasks = [task for task in LABELS if task in results]
    figure = Figure(figsize=(6.5 * len(tasks), 5.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        runs = results[task]["methods"]
        for i, (name, mine) in enumerate(runs.items()):
            points = min(len(run["curve"]) for run in mine)
            curve = [[run["curve"][k]["value"] for run in mine] for k in range(points)]
            seconds = [mine[0]["curve"][k]["epochs"] * mine[0]["seconds_per_epoch"] for k in range(points)]
            style = ("-", "--", ":", "-.")[i // 10 % 4]
            (line,) = axes.plot(seconds, [statistics.mean(v) for v in curve], style, color=f"C{i % 10}", label=name)
            low, high = [min(v) for v in curve], [max(v) for v in curve]
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
    if axes.get_legend_handles_labels()[0]:
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
    tried = " and ".join(f"{', '.join(f'{rate:g}' for rate in TASKS[task].rates)} ({task})" for task in tasks)
    return f"Each method tried the rates {tried} for half the time, on prompts, noise and a seed of their own."


def paper_tables(results: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Tables 3 to 5 and 7 and Figure 4 of the paper, and the groups; with what the JSON has of them."""
    tasks = [task for task in LABELS if task in results]
    parts, kept = ["## The paper's tables, here"], {}
    rows = []
    for name in ("tafs", "tafs_without_annealing", "tafs_without_step_advantage"):
        found = [told(values(mine)) if (mine := results[task]["methods"].get(name)) else "" for task in tasks]
        if any(found):
            rows.append([f"`{name}`", *found])
    parts += ["### Table 3: without annealing, without step-aware advantages"]
    parts += [table(["", *(LABELS[task] for task in tasks)], rows)]
    for key, title, first in (
        ("table_4", "Table 4: annealed steps in training", "annealed steps"),
        ("table_5", "Table 5: steps whose advantages are used, in both readings", "credit, steps"),
        ("groups", "SuperFlow's group sizes, among prompts of which two thirds teach nothing", "group_allocation"),
    ):
        if key in results:
            text, kept[key] = variants_table(first, results[key])
            parts += [f"### {title}", "Digits; `tafs` and its variants, as long.", text]
    parts += ["### Table 6: one reward or several", "On scenes: [examples/scenes](../examples/scenes/README.md)."]
    parts += ["### Table 7: intermediate and final rewards"]
    parts += ["Pearson's r over the judged prompts, 4 annealed steps, `tafs`, seed 0.", correlation_table(results)]
    parts += ["### Figure 4: the reward against inference steps", "![reward against steps](results/methods_steps.png)"]
    return parts, kept


def write(results: dict[str, Any], docs: Path, command: str, seeds: Sequence[int]) -> None:
    """The page between its marks, the JSON and the plots; what stands before the marks is kept."""
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in LABELS if task in results]
    budgets = {task: results[task]["methods"]["tafs"][0]["budget"] for task in tasks}
    seconds = " and ".join(f"{budgets[task]:g} ({task})" for task in tasks)
    shown = ", ".join(map(str, seeds))
    kept: dict[str, Any] = {"command": command, "seeds": list(seeds), "presets": {}, "guided": {}}
    kept["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}
    kept["versions"]["python"] = platform.python_version()
    distillers = results.get("distillers", {})
    kept["distillers"] = {
        name: {"rate": mine[0]["method"]["rate"], "at_time": facts("digits", mine)} for name, mine in distillers.items()
    }
    ideas, kept["ideas"] = ideas_table(results, tasks)
    parts = ["## Which of the ideas help", "The difference of the rewards at 4 steps, with its 95% interval.", ideas]
    for task in tasks:
        summary = summarise(task, results[task]["methods"], results[task]["rates"])
        for name, row in summary.items():
            kept["presets"].setdefault(name, {})[task] = row
        guided = results[task].get("guided", {})
        kept["guided"][task] = {steps: {k: v for k, v in row.items() if k != "values"} for steps, row in guided.items()}
        beside = distillers if task == "digits" else {}
        parts += [f"## {LABELS[task]}", EXPLAINED[task]]
        parts += [reward_table(task, results[task]["methods"], guided, beside)]
        parts += ["`NFE old`: evaluations of the denoiser to draw an image; `NFE`: with gradient; `other`: of old or"]
        parts[-1] += " reference policies; `decodes`: by the VAE."
        parts += [cost_table(summary)]
    papers, tables = paper_tables(results)
    kept |= tables
    plot_curves(results, folder / "methods_curves.png")
    plot_steps(results, folder / "methods_steps.png", ("tafs", "tafs_nft", "tafs_clean", "flow_grpo", "base"))
    parts += papers
    parts += ["## Reward against time", "![reward against time](results/methods_curves.png)"]
    tuning = tuning_sentence(results, tasks)
    parts += [HEAD.format(command=command, seeds=shown, seconds=seconds, tuning=tuning)]
    path = docs / "benchmarks.md"
    before = path.read_text().partition(BEGIN)[0] if path.is_file() else OPENING
    text = "\n\n".join(part.strip() for part in parts)
    path.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{text}\n\n{END}\n")
    (folder / "methods.json").write_text(json.dumps(kept, indent=1) + "\n")
