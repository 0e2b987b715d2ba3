"""Write the tables of docs/learning.md from docs/results/*.json: python docs/make_learning.py."""

from __future__ import annotations

import json
from pathlib import Path

from trl_tafs.output.markdown import table

DOCS = Path(__file__).parent
TARGET = DOCS / "learning.md"
TASKS = {"digits": "Digits, D = 64", "words": "Words, D = 1,536", "large": "Large words, D = 4,320"}


def load(name: str) -> dict:
    """One of the results."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


def command(told: dict) -> str:
    """The command that measured it."""
    return f"```bash\n{told['command']}\n```"


def commands(told: dict) -> str:
    """The commands that measured it."""
    return "```bash\n" + "\n".join(told["commands"]) + "\n```"


def cells(row: dict, second: str = "held_out") -> list[str]:
    """Reward with its seeds, second scorer, Frechet distance and saturated pixels of a number of steps."""
    seeds = " ".join(f"{value:.3f}"[1:] if value < 1 else "1.0" for value in row["seeds"])
    return [f"{row['reward']:.3f} ({seeds})", f"{row[second]:.3f}", f"{row['frechet']:.1f}", f"{row['saturated']:+.3f}"]


def figures(row: dict) -> list[str]:
    """At 4 steps by all judges, and at 2 and 8 by reward and Frechet distance."""
    others = [f"{row[n]['reward']:.3f}; {row[n]['frechet']:.1f}" for n in ("2", "8")]
    if "seeds" not in row["4"]:  # the base
        row = row | {"4": row["4"] | {"seeds": [row["4"]["reward"]]}}
    return [*cells(row["4"]), *others]


HEADER = ["reward at 4 steps (seeds)", "second judge", "Frechet", "saturated", "2 steps", "8 steps"]


def size_table() -> str:
    """Each setting at each size, at 2, 4 and 8 annealed steps."""
    told, parts = load("objectives")["table"], []
    for task, rows in told["tasks"].items():
        lines = []
        for name, row in rows.items():
            facts = [f"{row['rate']:g}", str(row["epochs"])] if "rate" in row else ["", ""]
            lines.append([name, *facts, *figures(row)])
        parts.append(f"**{TASKS[task]}**\n\n{table(['', 'rate', 'epochs', *HEADER], lines)}")
    return f"{commands(told)}\n\n" + "\n\n".join(parts)


def brake_table() -> str:
    """The default over rates, at once and four times its epochs."""
    told, parts = load("objectives")["brake"], []
    for task, rows in told["tasks"].items():
        lines = [["base", "", *figures(rows["base"])]]
        for rate, times in rows.items():
            if rate != "base":
                lines += [[rate, name, *figures(row)] for name, row in times.items()]
        parts.append(f"**{TASKS[task]}**\n\n{table(['rate', 'epochs', *HEADER], lines)}")
    return f"{commands(told)}\n\n" + "\n\n".join(parts)


def updates_table() -> str:
    """What holds the ratio, with several optimizer steps an epoch."""
    told, parts = load("objectives").get("updates", {"commands": [], "tasks": {}}), []
    for task, rows in told["tasks"].items():
        lines = []
        for name, row in rows.items():
            shares = [
                [f"{item[f'clipfrac_{sign}']:.2f}" for item in row["clipped"]] for sign in ("positive", "negative")
            ]
            lines.append([name, *cells(row["4"]), *(" ".join(share) for share in shares)])
        header = ["", *HEADER[:4], "clipped, A > 0", "clipped, A < 0"]
        parts.append(f"**{TASKS[task]}**\n\n{table(header, lines)}")
    return f"{commands(told)}\n\n" + "\n\n".join(parts)


def ablation_table() -> str:
    """The variants, the best first."""
    told = load("ablation")
    rows = []
    for name, row in sorted(told["variants"].items(), key=lambda item: -item[1]["reward_after"]):
        cells = [f"{row['reward_after']:.3f} +- {row['stderr']:.3f}"]
        cells += [f"{row[key]:.3f}" for key in ("judge_after", "colour_after", "print_after")]
        rows.append([name.removesuffix(", small"), *cells, str(row["epochs"])])
    return f"{command(told)}\n\n{table(['variant', 'reward', 'older judge', 'colour', 'print', 'epochs'], rows)}"


def gradient_table() -> str:
    """Cosines by estimator and size."""
    told = load("gradients")
    rows = []
    for name, row in told["estimators"].items():
        cells = [(f"{row[size]['cosine']:.3f}", f"{row[size]['seconds']:.1f}") for size in ("small", "large")]
        rows.append([name, *cells[0], *cells[1]])
    return f"{command(told)}\n\n{table(['estimator', 'D = 1,536', 'seconds', 'D = 4,320', 'seconds'], rows)}"


def main() -> None:
    """Replace what stands between each marker and its end."""
    text = TARGET.read_text()
    parts = {"size": size_table, "brake": brake_table, "updates": updates_table}
    parts |= {"ablation": ablation_table, "gradients": gradient_table}
    for name, make in parts.items():
        if f"<!-- {name} -->" not in text:
            continue
        made = make()
        before, _, rest = text.partition(f"<!-- {name} -->")
        text = f"{before}<!-- {name} -->\n{made}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
