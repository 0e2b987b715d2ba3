"""Prompt files as people have them: every encoding, ending and mistake is read as meant, or refused with its line."""

import json
import re

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_tafs.prompts.files import PARSERS, parse_prompts
from trl_tafs.prompts.sets import load_prompts

CAFE = "a café\na cat\n"


def load(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return load_prompts(str(folder / name))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_with_any_mark_and_line_end(tmp_path, encoding, end):
    """Before, the mark became part of the first prompt, and UTF-16 a bare UnicodeDecodeError."""
    assert load(tmp_path, "a.txt", CAFE.replace("\n", end).encode(encoding)) == ["a café", "a cat"]


@pytest.mark.parametrize(
    ("data", "line", "told"),
    [
        (("a cat\n" + CAFE).encode("cp1252"), 2, "byte 0xe9 isn't UTF-8; save it as UTF-8"),
        (CAFE.encode("utf-16-le"), 1, "a NUL.*save it as UTF-8|isn't UTF-8; save it as UTF-8"),
        (b"\xff\xfea\x00\n\x00\x00\xd8", 2, "isn't UTF-16; save it as UTF-8"),
        (b"a cat\n\x89PNG\r\n", 2, "save it as UTF-8"),
    ],
    ids=["cp1252", "utf-16 without a mark", "utf-16 cut", "picture"],
)
def test_another_encoding_is_named_with_file_and_line(tmp_path, data, line, told):
    with pytest.raises(ValueError, match=rf"a.txt, line {line}: .*({told})"):
        load(tmp_path, "a.txt", data)


def test_lines_end_at_line_ends_alone(tmp_path):
    """Before, a line separator within a prompt made two of it, and of a JSON row none."""
    row = json.dumps({"prompt": "a\u2028b", "n": "\x85"}, ensure_ascii=False)
    assert load(tmp_path, "a.jsonl", row) == [{"prompt": "a\u2028b", "n": "\x85"}]
    assert load(tmp_path, "a.txt", "a\u2028b\n\n \t\nc\x0bd") == ["a\u2028b", "c\x0bd"]


@pytest.mark.parametrize("name", ["A.TXT", "a.Txt", "b.JSONL", "c.JSON", "d.CSV", "e.tsv", "f.TSV"])
def test_endings_in_any_case(tmp_path, name):
    """Before: "couldn't find any data file" for a file that is there."""
    kind = name.lower()[2:]
    data = {"txt": "one", "jsonl": '{"prompt": "one"}', "json": '[{"prompt": "one"}]', "csv": "prompt,n\none,1"}
    data["tsv"] = "prompt\tn\none\t1"
    rows = load(tmp_path, name, data[kind])
    assert [row if isinstance(row, str) else row["prompt"] for row in rows] == ["one"]


@pytest.mark.parametrize("name", ["prompts", "prompts.text", "prompts.parquet", "prompts.txt.bak"])
def test_another_ending_is_refused_with_those_that_are_read(tmp_path, name):
    with pytest.raises(ValueError, match=r"rename it to .txt .*.jsonl, .json, .csv or .tsv"):
        load(tmp_path, name, "a cat\n")


# Tables ---------------------------------------------------------------------------------------------------------


def test_a_tables_cells_are_what_they_were_with_datasets_but_for_missing_values(tmp_path):
    text = 'prompt,n,x,yes,word,code\n"a, ""b""\nc",1,.5,True,NA,007\nNA,,2e3,false,,8\nnull,-3,4.,TRUE,nan,9\n'
    rows = load(tmp_path, "a.csv", text)
    assert [row["prompt"] for row in rows] == ['a, "b"\nc', "NA", "null"]  # before: None, and an end in its epoch
    assert [row["n"] for row in rows] == [1, None, -3] and [row["x"] for row in rows] == [0.5, 2000.0, 4.0]
    assert [row["yes"] for row in rows] == [True, False, True]
    assert [row["word"] for row in rows] == ["NA", None, "nan"] and [row["code"] for row in rows] == ["007", "8", "9"]
    plain = "prompt,digit,size,name\none,1,0.5,a\ntwo,2,1.5,b\n"
    rows = load(tmp_path, "b.csv", plain)
    assert rows == list(datasets.load_dataset("csv", data_files=str(tmp_path / "b.csv"), split="train"))
    assert load(tmp_path, "c.csv", "prompt\n5\n7\n") == [{"prompt": "5"}, {"prompt": "7"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "prompt;n\na, b;1\n"), ("a.tsv", 'prompt,n\n"a, b",1\n'), ("a.csv", "\n\nprompt\tn\na, b\t1\n\t\n")],
)
def test_the_separator_is_the_one_that_shows_the_prompt_column(tmp_path, name, text):
    assert load(tmp_path, name, text) == [{"prompt": "a, b", "n": 1}]


REFUSED = {
    "empty text": ("a.txt", b"", "a.txt holds no prompts"),
    "empty table": ("a.csv", b"", "a.csv, line 1: no column is named 'prompt'"),
    "header alone": ("a.csv", b"prompt,n\n", "a.csv holds no prompts"),
    "no column": ("a.csv", b"text,n\na,1\n", "a.csv, line 1: no column is named 'prompt', only 'text', 'n'"),
    "case": ("a.csv", b"Prompt\na\n", "only 'Prompt'"),
    "long row": ("a.csv", b"prompt,n\na,1\na, b,2\n", "a.csv, line 3: 3 cells under 2 columns"),
    "short row": ("a.csv", b"prompt,n\n\na\n", "a.csv, line 3: 1 cells under 2 columns"),
    "open quote": ("a.csv", b'prompt,n\n"a,1\nb,2\n', "a.csv, line 3: unexpected end of data"),
    "empty cell": ("a.csv", b"prompt,n\na,1\n ,2\n", "a.csv, line 3: the prompt is empty"),
    "two of a name": ("a.csv", b"prompt,prompt\na,b\n", "all different"),
    "number": ("a.json", b"5", "a.json, line 1: it holds '5', and must hold a list"),
    "object": ("a.json", b'{"prompt": "a"}', "a.json, line 1: it holds one object, and must hold a list"),
    "lines as json": ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}', "a.json, line 2 isn't JSON.*jsonl"),
    "empty json": ("a.json", b"", "a.json, line 1 isn't JSON"),
    "empty list": ("a.json", b"[]", "a.json holds no prompts"),
    "a row of json": ("a.json", b'["a", {"text": "b"}]', "a.json, row 2: there is no 'prompt', only ['text']"),
    "deep": ("a.jsonl", b'"a"\n' + b"[" * 100_000, "a.jsonl, line 2 isn't JSON: .*nested"),
    "long number": ("a.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl, line 1 isn't JSON"),
    "null": ("a.jsonl", b'"a"\n\nnull\n{"prompt": NaN}', "a.jsonl, line 3: the prompt is None, not text; line 4"),
    "surrogate": ("a.jsonl", b'"\\ud83d"', "a.jsonl, line 1: .*surrogate"),
}


@pytest.mark.parametrize(("name", "data", "told"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_wrong_is_refused_in_one_line_with_its_name_and_place(tmp_path, name, data, told):
    with pytest.raises(ValueError, match=re.escape(told).replace(r"\.\*", ".*")) as caught:
        load(tmp_path, name, data)
    assert "\n" not in str(caught.value)


# Anything -------------------------------------------------------------------------------------------------------

PIECES = [
    "prompt",
    "a cat",
    ",",
    "\t",
    ";",
    '"',
    "\n",
    "\r\n",
    "{",
    "}",
    "[",
    "]",
    ":",
    '{"prompt": "a"}',
    "null",
    "NaN",
]
PIECES += ["\ufeff", "\0", "1", "\\ud800", "1e999", " "]
BYTES = st.binary(max_size=60) | st.lists(
    st.sampled_from([piece.encode() for piece in PIECES] + [b"\xff\xfe", b"\xe9"]), max_size=20
).map(b"".join)


def check_any_file(data, ending):
    try:
        rows = parse_prompts(data, f"a{ending}")
    except ValueError as error:
        assert str(error).startswith(f"a{ending}") and "\n" not in str(error), error
        return
    assert rows and all((row if isinstance(row, str) else row["prompt"]).strip() for row in rows)


@settings(max_examples=150)
@given(BYTES, st.sampled_from(list(PARSERS)))
def test_any_bytes_are_prompts_or_our_error(data, ending):
    check_any_file(data, ending)


@pytest.mark.slow
@settings(max_examples=5000)
@given(BYTES, st.sampled_from(list(PARSERS)))
def test_any_bytes_are_prompts_or_our_error_at_length(data, ending):
    check_any_file(data, ending)
