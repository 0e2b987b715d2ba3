"""Write the tables of docs/learning.md from docs/results/*.json: python docs/make_learning.py."""

from __future__ import annotations

import json
from pathlib import Path

from trl_tafs.output.markdown import table

DOCS = Path(__file__).parent
TARGET = DOCS / "learning.md"


def load(name: str) -> dict:
    """One of the results."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


def command(told: dict) -> str:
    """The command that measured it."""
    return f"```bash\n{told['command']}\n```"


def size_table() -> str:
    """Rewards before and after, by setting and size."""
    told = load("size")
    header = ["setting, size", "D", "reward", "older judge", "base, 32 ODE", "colour", "gain +- its error", "CPU s"]
    rows = []
    for name, row in told["settings"].items():
        colour = f"{row['colour_before']:.2f} to {row['colour_after']:.2f}" if "colour_after" in row else ""
        gain = row["reward_after"] - row["reward_before"]
        cells = [f"{row['D']:,}", f"{row['reward_before']:.3f} to {row['reward_after']:.3f}"]
        cells += [f"{row['judge_before']:.3f} to {row['judge_after']:.3f}", f"{row['reward_base_32_ode']:.3f}", colour]
        cells += [f"{gain:.3f} +- {row['stderr']:.3f}", f"{row['cpu_seconds']:.0f}"]
        rows.append([name, *cells, ", ".join(map(str, row["epochs"]))])
    return f"{command(told)}\n\n{table([*header, 'epochs'], rows)}"


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
    for name, made in (("size", size_table()), ("ablation", ablation_table()), ("gradients", gradient_table())):
        before, _, rest = text.partition(f"<!-- {name} -->")
        text = f"{before}<!-- {name} -->\n{made}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
