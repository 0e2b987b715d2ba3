import json
from collections import Counter

import pytest
import tiny

from trl_tafs.prompts.sets import PROMPT_SETS, article, geneval_prompts, load_prompts, plural
from trl_tafs.prompts.source import PromptSource
from trl_tafs.rewards.geneval_rules import COCO_NAMES, TAGS, check_row

DATA = tiny.ROOT.parent / "shared" / "data"


def test_made_prompts_are_in_turn_of_all_six_tasks_and_never_twice():
    rows = geneval_prompts(600, seed=3)
    assert Counter(row["tag"] for row in rows)["counting"] == 104  # 80 classes leave single_object early
    assert Counter(row["tag"] for row in rows)["single_object"] == 80
    assert len({row["prompt"] for row in rows}) == 600
    for row in rows:
        check_row(row)
    assert rows == geneval_prompts(600, seed=3) and rows != geneval_prompts(600, seed=4)
    assert {r["class"] for row in rows for r in row["include"]} == set(COCO_NAMES)
    assert not any(r["class"] == "person" and "color" in r for row in rows for r in row["include"])


def test_the_words_say_what_the_metadata_does():
    for row in geneval_prompts(120, seed=1):
        text, first = row["prompt"].removeprefix("a photo of "), row["include"][0]
        if row["tag"] == "counting":
            assert row["exclude"] == [{"class": first["class"], "count": first["count"] + 1}]
            assert text == f"{ {2: 'two', 3: 'three', 4: 'four'}[first['count']] } {plural(first['class'])}"
        elif row["tag"] == "position":
            relation, target = row["include"][1]["position"]
            assert target == 0
            assert text == f"{article(row['include'][1]['class'])} {relation} {article(first['class'])}"
        else:
            parts = [f"{r['color']} {r['class']}" if "color" in r else r["class"] for r in row["include"]]
            assert text == " and ".join(map(article, parts))


def test_made_rows_have_the_benchmarks_form():
    path = DATA / "geneval" / "evaluation_metadata.jsonl"
    if not path.is_file():
        pytest.skip("the prompt sets are not part of the project")

    def form(row):
        return row["tag"], tuple(sorted(row)), tuple(tuple(sorted(r)) for r in row["include"])

    assert {form(row) for row in load_prompts(str(path))} == {form(row) for row in geneval_prompts(60)}


def test_plurals_and_articles():
    assert [plural(n) for n in ("bus", "wine glass", "sandwich", "knife", "hot dog", "computer mouse", "skis")] == [
        "buses", "wine glasses", "sandwiches", "knives", "hot dogs", "computer mice", "skis",
    ]  # fmt: skip
    assert article("orange") == "an orange" and article("dog") == "a dog"


def test_tasks_can_be_chosen_and_run_out():
    assert {row["tag"] for row in geneval_prompts(30, tags=["colors", "position"])} == {"colors", "position"}
    with pytest.raises(ValueError, match="no task size; use some of single_object"):
        geneval_prompts(1, tags=["size"])
    with pytest.raises(ValueError, match="no 81 different prompts of single_object, only 80"):
        geneval_prompts(81, tags=["single_object"])
    assert set(TAGS) == {row["tag"] for row in load_prompts("geneval-style:12:7")}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt"', "line 2 isn't JSON"),
        ("b.csv", None, "no prompt file"),
        ("geneval-style:ten", None, "isn't geneval-style:NUMBER"),
    ],
)
def test_what_is_no_prompt_set_is_said(tmp_path, name, text, message):
    source = name if name.startswith("geneval") else str(tmp_path / name)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_rows_keep_their_metadata(tmp_path):
    rows = geneval_prompts(12)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups = PromptSource(load_prompts(str(tmp_path / "rows.jsonl"))).groups(0, 12)
    assert sorted(prompt for prompt, _ in groups) == sorted(row["prompt"] for row in rows)
    assert all(metadata["tag"] in TAGS and metadata["include"] for _, metadata in groups)


def test_named_sets_are_complete():
    for loader, arguments, column in PROMPT_SETS.values():
        assert loader in ("json", "text") or "/" in loader
        assert column and (arguments.get("split") or arguments["data_files"].startswith("https://"))
