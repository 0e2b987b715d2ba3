"""Prompt sets: files, datasets, the papers' own by name, and GenEval-style prompts made with a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT_SETS = {  # the papers' sets by their public names: (loader of `datasets`, its arguments, the prompts' column)
    "geneval": (
        "json",
        {"data_files": "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"},
        "prompt",
    ),
    **{
        f"flow_grpo/{name}": (
            kind,
            {"data_files": f"https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset/{path}"},
            column,
        )
        for name, kind, path, column in (
            ("geneval_train", "json", "geneval/train_metadata.jsonl", "prompt"),
            ("geneval_test", "json", "geneval/test_metadata.jsonl", "prompt"),
            ("ocr_train", "text", "ocr/train.txt", "text"),
            ("ocr_test", "text", "ocr/test.txt", "text"),
            ("pickapic_train", "text", "pickscore/train.txt", "text"),
            ("pickapic_test", "text", "pickscore/test.txt", "text"),
        )
    },
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", {"split": "test_unique"}, "caption"),
    "parti": ("nateraw/parti-prompts", {"split": "train"}, "Prompt"),
}


def load_prompts(source: str) -> Any:
    """Prompts for training and evaluation: a list of strings or rows, or a dataset with a `prompt` column.

    Args:
        source: a .txt file (one prompt a line); a .jsonl, .json or .csv file with a `prompt` column, the other columns
            being the prompts' metadata; a name of `PROMPT_SETS`; `geneval-style:NUMBER:SEED`; or a dataset on the Hub,
            `user/name` or `user/name:split`.

    Raises:
        ValueError: there is no such file, a row isn't JSON, or there are no prompts.
    """
    path = Path(source)
    if source.startswith("geneval-style:"):
        return _made(source)
    if path.suffix == ".txt":
        rows: list[Any] = [line.strip() for line in _read(path).splitlines() if line.strip()]
    elif path.suffix == ".jsonl":
        rows = [_row(path, i, line) for i, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(_read(path))
    elif path.suffix == ".csv":
        from datasets import load_dataset

        _read(path)
        return load_dataset("csv", data_files=str(path), split="train")
    else:
        return _dataset(source)
    if not rows:
        raise ValueError(f"{source} holds no prompts; write one a line")
    return rows


def _made(source: str) -> list[dict[str, Any]]:
    parts = source.split(":")[1:]
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"{source!r} isn't geneval-style:NUMBER or geneval-style:NUMBER:SEED")
    return geneval_prompts(int(parts[0]), int(parts[1]) if len(parts) > 1 else 0)


def _row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} isn't JSON: {error}") from error


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no prompt file {path}")
    return path.read_text(encoding="utf-8")


def _dataset(source: str) -> Any:
    from datasets import load_dataset

    if source not in PROMPT_SETS:
        name, _, split = source.partition(":")
        return load_dataset(name, split=split or "train")
    loader, arguments, column = PROMPT_SETS[source]
    if loader == "json":  # its rows differ in their columns, which a dataset would fill up with None
        import fsspec

        with fsspec.open(arguments["data_files"], "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    dataset = load_dataset(loader, **({"split": "train"} | arguments))
    return dataset if column == "prompt" else dataset.rename_column(column, "prompt")


NUMBERS = {2: "two", 3: "three", 4: "four"}


POSITIONS = ("left of", "right of", "above", "below")


IRREGULAR = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "knife": "knives"}


IRREGULAR |= {"mouse": "mice"}


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """More than one of it."""
    *front, last = noun.split(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    else:
        last += "es" if last.endswith(("s", "sh", "ch", "x")) else "s"
    return " ".join([*front, last])


def geneval_prompts(number: int, seed: int = 0, tags: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prompts of GenEval's kind, with the metadata that its reward judges by: the tasks in turn, no prompt twice.

    The classes are COCO's 80. A person has no colour, as in the benchmark.

    Args:
        number: of prompts.
        seed: of the choice.
        tags: of GenEval's tasks; by default all six.

    Raises:
        ValueError: a tag is unknown, or there aren't so many different prompts.
    """
    from trl_tafs.rewards.geneval_rules import TAGS

    chosen = tuple(TAGS if tags is None else tags)
    unknown = [tag for tag in chosen if tag not in TAGS]
    if unknown or not chosen:
        raise ValueError(f"GenEval has no task {', '.join(unknown) or '(none given)'}; use some of {', '.join(TAGS)}")
    generator, rows, seen, misses = random.Random(seed), [], set(), 0
    exhausted: set[str] = set()
    while len(rows) < number:
        open_tags = [tag for tag in chosen if tag not in exhausted]
        if not open_tags:
            raise ValueError(f"there are no {number} different prompts of {', '.join(chosen)}, only {len(rows)}")
        tag = open_tags[len(rows) % len(open_tags)]
        row = _prompt(tag, generator)
        if row["prompt"] in seen:
            misses += 1
            if misses > 2000:  # as good as certainly all of this task's are there
                exhausted.add(tag)
                misses = 0
            continue
        misses = 0
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def _prompt(tag: str, generator: random.Random) -> dict[str, Any]:
    """One row of a task."""
    from trl_tafs.rewards.geneval_rules import COCO_NAMES, COLORS

    coloured = [name for name in COCO_NAMES if name != "person"]
    first, second = generator.sample(coloured if tag in ("colors", "color_attr") else COCO_NAMES, 2)
    one, two = {"class": first, "count": 1}, {"class": second, "count": 1}
    row: dict[str, Any] = {"tag": tag, "include": [one]}
    if tag == "single_object":
        text = article(first)
    elif tag == "two_object":
        row["include"], text = [one, two], f"{article(first)} and {article(second)}"
    elif tag == "counting":
        count = generator.choice(list(NUMBERS))
        one["count"], text = count, f"{NUMBERS[count]} {plural(first)}"
        row["exclude"] = [{"class": first, "count": count + 1}]
    elif tag == "colors":
        one["color"] = generator.choice(COLORS)
        text = f"{article(one['color'])} {first}"
    elif tag == "position":
        two["position"] = [generator.choice(POSITIONS), 0]
        row["include"], text = [one, two], f"{article(second)} {two['position'][0]} {article(first)}"
    else:
        one["color"], two["color"] = generator.sample(COLORS, 2)
        row["include"] = [one, two]
        text = f"{article(one['color'])} {first} and {article(two['color'])} {second}"
    return row | {"prompt": f"a photo of {text}"}
