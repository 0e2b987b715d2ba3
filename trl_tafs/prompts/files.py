"""Prompts from files: text, JSON and tables, checked row by row; whatever is wrong is said with file and line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_tafs.prompts.source import describe_faults, prompt_fault
from trl_tafs.rewards.web import read_json

LINE = re.compile(r"\r\n|\r|\n")  # str.splitlines would divide at characters that a prompt may have
BOMS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (  # what a table's column may be, beside text
    (re.compile(r"[+-]?(0|[1-9][0-9]{0,17})"), int),
    (re.compile(r"[+-]?((0|[1-9][0-9]{0,99})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?"), float),
    (re.compile(r"true|false", re.IGNORECASE), lambda cell: cell.lower() == "true"),
)


def read_prompt_file(path: Path) -> list[Any]:
    """Return a file's rows: strings, or dicts with `prompt`.

    Raises:
        ValueError: there is no such file, or it is not what its ending says; with the line.
    """
    if not is_file(path):
        raise ValueError(f"there is no prompt file {path}")
    if path.suffix.lower() not in PARSERS:
        raise ValueError(
            f"{path}: its ending doesn't say what it holds; rename it to .txt (one prompt a line), .jsonl, .json, .csv "
            "or .tsv"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    return parse_prompts(data, str(path))


def is_file(path: Path) -> bool:
    """Return whether there is such a file; none has a name that the system refuses."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_prompts(data: bytes, name: str) -> list[Any]:
    """Return the rows of a file's bytes by the ending of its name, every prompt checked; raise ValueError likewise."""
    rows, places = PARSERS[Path(name).suffix.lower()](decode_text(data, name), name)
    faults = [(where, fault) for where, row in zip(places, rows, strict=True) if (fault := prompt_fault(row))]
    if faults:
        raise ValueError(f"{name}, {describe_faults(faults)}")
    if not rows:
        raise ValueError(f"{name} holds no prompts; write one a line")
    return rows


def decode_text(data: bytes, name: str) -> str:
    """Return text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, without the mark.

    Raises:
        ValueError: it is in another encoding, or no text; with the line.
    """
    encoding = next((encoding for bom, encoding in BOMS if data.startswith(bom)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        told = f"byte 0x{data[error.start]:02x} isn't {encoding.removesuffix('-sig').upper()}"
        raise ValueError(f"{name}, line {line}: {told}; save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{name}, line {line}: a NUL, as in UTF-16 without its mark or in no text; save it as UTF-8")
    return text


Parsed = tuple[list[Any], Sequence[str]]  # rows, and where each is


def _text(text: str, name: str) -> Parsed:
    lines = [(i, line.strip()) for i, line in enumerate(LINE.split(text), 1) if line.strip()]
    return [line for _, line in lines], [f"line {i}" for i, _ in lines]


def _json_lines(text: str, name: str) -> Parsed:
    rows, places = [], []
    for i, line in enumerate(LINE.split(text), 1):
        if line.strip():
            try:
                rows.append(read_json(line, nan=True))
            except ValueError as error:
                raise ValueError(f"{name}, line {i} isn't JSON: {error}") from error
            places.append(f"line {i}")
    return rows, places


def _json(text: str, name: str) -> Parsed:
    try:
        rows = read_json(text, nan=True)
    except json.JSONDecodeError as error:
        hint = "; one row a line is what .jsonl files hold" if error.msg == "Extra data" else ""
        raise ValueError(f"{name}, line {error.lineno} isn't JSON: {error}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{name} isn't JSON: {error}") from error
    if not isinstance(rows, list):
        kind = "one object" if isinstance(rows, dict) else f"{str(rows)[:40]!r}"
        raise ValueError(f"{name}, line 1: it holds {kind}, and must hold a list of prompts or rows, [...]")
    return rows, [f"row {i}" for i in range(1, len(rows) + 1)]


def _table(text: str, name: str) -> Parsed:
    """Rows of a table with a header. Its separator is the ending's, or the one at which the header has `prompt`."""
    own = "\t" if name.lower().endswith(".tsv") else ","
    headers = {separator: _header(text, separator) for separator in dict.fromkeys((own, ",", "\t", ";"))}
    separator = next((separator for separator, header in headers.items() if "prompt" in header), None)
    if separator is None:
        raise ValueError(f"{name}, line 1: no column is named 'prompt', only {', '.join(map(repr, headers[own]))}")
    header = headers[separator]
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"{name}, line 1: the columns {', '.join(map(repr, header))} need a name each, all different")
    reader, cells, places = _reader(text, separator), [], []
    try:
        for row in reader:
            if not "".join(row).strip():
                continue
            if len(row) != len(header):
                told = f"{len(row)} cells under {len(header)} columns; put quotes around a cell with {separator!r}"
                raise ValueError(f"{name}, line {reader.line_num}: {told}")
            cells.append(row)
            places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from error
    columns = [
        values if column == "prompt" else _typed(values)
        for column, values in zip(header, zip(*cells[1:], strict=True), strict=False)
    ]
    return [dict(zip(header, row, strict=True)) for row in zip(*columns, strict=True)], places[1:]


def _reader(text: str, separator: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _header(text: str, separator: str) -> list[str]:
    try:
        return [cell.strip() for cell in next((row for row in _reader(text, separator) if "".join(row).strip()), [])]
    except csv.Error:
        return []


def _typed(cells: Sequence[str]) -> list[Any]:
    """A column as numbers or truth values if all its filled cells are; an empty cell is None, and NA is a word."""
    filled = [cell for cell in cells if cell]
    for pattern, kind in NUMBERS:
        if filled and all(pattern.fullmatch(cell) for cell in filled):
            return [kind(cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]


PARSERS: dict[str, Callable[[str, str], Parsed]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
}
