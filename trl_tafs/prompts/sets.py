"""Prompt sets: files, datasets, the papers' own by name, and GenEval-style prompts made with a seed."""

from __future__ import annotations

import os
import random
import re
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_tafs.output.errors import did_you_mean
from trl_tafs.output.secrets import hide
from trl_tafs.pipelines.pictures import SOURCES
from trl_tafs.prompts.files import PARSERS, is_file, parse_prompts, read_prompt_file
from trl_tafs.rewards.web import WebError, fetch, parse_address, printable

SET_FILES = {  # files on GitHub: OWNER/REPOSITORY/BRANCH/PATH
    "geneval": "djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
    "geneval2": "facebookresearch/GenEval2/main/geneval2_data.jsonl",
    "flow_grpo/geneval_train": "yifan123/flow_grpo/main/dataset/geneval/train_metadata.jsonl",
    "flow_grpo/geneval_test": "yifan123/flow_grpo/main/dataset/geneval/test_metadata.jsonl",
    "flow_grpo/ocr_train": "yifan123/flow_grpo/main/dataset/ocr/train.txt",
    "flow_grpo/ocr_test": "yifan123/flow_grpo/main/dataset/ocr/test.txt",
    "flow_grpo/pickapic_train": "yifan123/flow_grpo/main/dataset/pickscore/train.txt",
    "flow_grpo/pickapic_test": "yifan123/flow_grpo/main/dataset/pickscore/test.txt",
}
SET_DATASETS = {  # files of datasets on the Hub: (name, files, the prompts' column)
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", "data/test_unique-*.parquet", "caption"),
    "parti": ("nateraw/parti-prompts", "*.tsv", "Prompt"),
}
PROMPT_SETS = (*SET_FILES, *SET_DATASETS)  # the papers' sets by their public names
MIRROR = "TRL_TAFS_PROMPT_SETS"  # the environment's: the address that GitHub's files are fetched from
GITHUB = "https://raw.githubusercontent.com"
FETCH_SECONDS = 60.0
FETCH_BYTES = 64 * 2**20
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(:[^/\s]{1,96})?")


def load_prompts(source: str) -> Any:
    """Return prompts for training and evaluation: a list of strings or rows, or a dataset with a `prompt` column.

    Args:
        source: a .txt file (one prompt a line); a .jsonl, .json, .csv or .tsv file with a `prompt` column, the other
            columns being the prompts' metadata, paths in `source_image` and `source_images` from the file's folder; a
            name of `PROMPT_SETS`; `geneval-style:NUMBER:SEED`; or a dataset on the Hub, `user/name` or
            `user/name:split`.

    Raises:
        ValueError: there is no such file, set or dataset, it can't be fetched, or a row has no prompt.
    """
    path = Path(source)
    if source.startswith("geneval-style:"):
        return _made(source)
    if source in SET_FILES:
        return _fetched(source)
    if path.suffix.lower() in PARSERS or is_file(path):
        return [_beside(row, path.parent) for row in read_prompt_file(path)]
    if source in SET_DATASETS:
        return _downloaded(source)
    if not HUB_NAME.fullmatch(source) and not (source and os.path.isdir(source)):
        raise ValueError(
            f"{source!r:.200} is no prompt file, no set ({', '.join(PROMPT_SETS)}) and no dataset user/name"
            f"{did_you_mean(source, PROMPT_SETS)}"
        )
    name, _, split = source.partition(":")
    return _dataset(name, split or "train")


def _beside(row: Any, folder: Path) -> Any:
    """Return a row of a file with the paths of its source pictures seen from the file's folder."""
    if not isinstance(row, dict):
        return row
    found = dict(row)
    for name in SOURCES:
        value = row.get(name)
        if isinstance(value, str):
            found[name] = str(folder / value) if value else None
        elif isinstance(value, list):
            found[name] = [str(folder / one) if isinstance(one, str) else one for one in value]
    return found


def _made(source: str) -> list[dict[str, Any]]:
    parts = source.split(":")[1:]
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"{source!r} isn't geneval-style:NUMBER or geneval-style:NUMBER:SEED")
    return geneval_prompts(int(parts[0]), int(parts[1]) if len(parts) > 1 else 0)


def _fetched(name: str) -> list[Any]:
    """A set's rows, from the copy in the cache if there is one, else from GitHub, or the mirror, into the cache."""
    from huggingface_hub import constants

    kept = Path(os.environ.get("HF_HOME") or constants.HF_HOME) / "trl_tafs" / "prompts" / SET_FILES[name]
    if is_file(kept):
        return read_prompt_file(kept)
    address = parse_address(os.environ.get(MIRROR) or GITHUB)
    try:
        answer = fetch(address, f"/{SET_FILES[name]}", deadline=FETCH_SECONDS, max_bytes=FETCH_BYTES)
        if answer.status != 200:
            raise WebError(f"{address.label} answered {answer.status}: {answer.text(100)}")
    except WebError as error:
        raise ValueError(
            f"the prompt set {name} can't be fetched ({error}); put a copy of {GITHUB}/{SET_FILES[name]} at {kept}, or "
            f"give the path of one instead of {name}, or set {MIRROR} to a mirror's address"
        ) from error
    rows = parse_prompts(answer.body, SET_FILES[name])
    _keep(kept, answer.body)
    return rows


def _keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; without a place for it, it is fetched again the next time."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        warnings.warn(f"{path} can't be kept ({error}); the prompts are fetched again the next time", stacklevel=4)


def _downloaded(source: str) -> Any:
    """A set that is a dataset's files: these alone, where `load_dataset` would download those of every split."""
    from datasets import Dataset
    from huggingface_hub import snapshot_download

    name, files, column = SET_DATASETS[source]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=[files]))
        paths = sorted(map(str, folder.glob(files)))
        if not paths:
            raise ValueError(f"{name} has no file {files}")
        dataset = Dataset.from_csv(paths, sep="\t") if files.endswith(".tsv") else Dataset.from_parquet(paths)
        return dataset.rename_column(column, "prompt")
    except Exception as error:  # the network's edge, and a stranger's files
        raise ValueError(
            f"the prompt set {source} can't be fetched from the Hub ({_told(error)}); give a file with a column "
            f"`prompt` instead, or set HF_ENDPOINT to a mirror's address"
        ) from error


def _dataset(name: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the network's edge, and a stranger's files
        raise ValueError(
            f"{name!r}, split {split!r}, can't be loaded: {_told(error)}; prompts are a file, a set "
            f"({', '.join(PROMPT_SETS)}) or a dataset user/name:split{did_you_mean(name, PROMPT_SETS)}"
        ) from error


def _told(error: Exception) -> str:
    """Return a library's message as one line without passwords."""
    return printable(hide(str(error).strip() or type(error).__name__))


NUMBERS = {2: "two", 3: "three", 4: "four"}


POSITIONS = ("left of", "right of", "above", "below")


IRREGULAR = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "knife": "knives"}


IRREGULAR |= {"mouse": "mice"}


def article(noun: str) -> str:
    """Return the noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    *front, last = noun.split(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    else:
        last += "es" if last.endswith(("s", "sh", "ch", "x")) else "s"
    return " ".join([*front, last])


def geneval_prompts(number: int, seed: int = 0, tags: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Make prompts of GenEval's kind, with the metadata that its reward needs: the tasks in turn, no prompt twice.

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
    """Make a row of a task."""
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
