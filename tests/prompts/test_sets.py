import io
import json
import re
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
import tiny
from hub_stub import HubStub
from huggingface_hub import constants
from loopback import http, serving, speaking
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from trl_tafs.prompts.sets import MIRROR, SET_DATASETS, SET_FILES, article, geneval_prompts, load_prompts, plural
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


# Sets by name ---------------------------------------------------------------------------------------------------

CONTENT = {".jsonl": b'{"prompt": "a cat", "tag": "counting"}\n', ".txt": b"a cat\n\na dog\n"}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A stand-in for GitHub's files on 127.0.0.1, as users have one by the environment; the paths asked for."""
    asked = []

    async def file(request):
        asked.append(request.url.path)
        return Response(CONTENT[request.url.path[request.url.path.rindex(".") :]])

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Starlette(routes=[Route("/mirror/{path:path}", file)])) as url:
        monkeypatch.setenv(MIRROR, f"{url}/mirror")
        yield asked


@pytest.mark.parametrize("name", SET_FILES)
def test_every_named_file_is_fetched_once_without_other_libraries(mirror, name):
    """Before: ImportError, aiohttp, which datasets doesn't bring any more."""
    rows = [row if isinstance(row, str) else row["prompt"] for row in load_prompts(name)]
    assert rows == (["a cat", "a dog"] if SET_FILES[name].endswith(".txt") else ["a cat"])
    assert mirror == [f"/mirror/{SET_FILES[name]}"]
    assert load_prompts(name) and len(mirror) == 1, "the second time it is there"


def refusing(status, body=b"", **headers):
    return lambda connection: connection.sendall(http(body, status, **headers))


def endless(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        (refusing("404 Not Found", b"no such file"), "answered 404: no such file"),
        (refusing("302 Found", Location="http://elsewhere.example/x"), "a redirect to http://elsewhere.example/x"),
        (refusing("200 OK", b"\x1f\x8b", Content_Encoding="gzip"), "compressed"),
        (refusing("200 OK", b"<html>log in</html>"), "line 1 isn't JSON"),
        (endless, "sent more than"),
    ],
    ids=["404", "redirect", "gzip", "page", "endless"],
)
def test_a_set_that_cannot_be_had_says_where_a_copy_goes(tmp_path, monkeypatch, talk, told):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with speaking(talk) as url:
        monkeypatch.setenv(MIRROR, url)
        with pytest.raises(ValueError, match=re.escape(told)) as caught:
            load_prompts("geneval")
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.jsonl*")), "nothing of it is kept"
    if "isn't JSON" not in told:
        kept = re.search(r"put a copy of https://\S+ at (\S+), or", str(caught.value))[1]
        Path(kept).parent.mkdir(parents=True)
        Path(kept).write_bytes(CONTENT[".jsonl"])
        assert load_prompts("geneval")[0]["prompt"] == "a cat", "and there it is found"


def test_a_server_that_drips_a_set_is_cut_off(tmp_path, monkeypatch):
    def drip(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(18_000):  # until the other side hangs up, or 900 s
            connection.sendall(b" ")
            time.sleep(0.05)

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("trl_tafs.prompts.sets.FETCH_SECONDS", 0.5)
    with speaking(drip) as url:
        monkeypatch.setenv(MIRROR, url)
        with pytest.raises(ValueError, match=r"timed out after 0.5 s"):
            load_prompts("flow_grpo/ocr_test")


def parquet(**columns):
    file = io.BytesIO()
    datasets.Dataset.from_dict(columns).to_parquet(file)
    return file.getvalue()


PARTI = 'Prompt\tCategory\tChallenge\tNote\na "yes" sign\tSigns\tBasic\t\na cat, asleep\tAnimals\tBasic\tfine\n'
DATASETS = {
    "yuvalkirstain/pickapic_v1_no_images": {
        "data/test_unique-00001-of-00002-ab.parquet": parquet(caption=["a dog"], user_id=[3]),
        "data/test_unique-00000-of-00002-cd.parquet": parquet(caption=["a cat", "a cow"], user_id=[1, 2]),
        "data/train-00000-of-00001-ef.parquet": b"of 8 GB",
    },
    "nateraw/parti-prompts": {"README.md": b"---\nlicense: apache-2.0\n---\n", "PartiPrompts.tsv": PARTI.encode()},
    "user/own": {"train.jsonl": CONTENT[".jsonl"]},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub on 127.0.0.1, which this process takes for it."""
    with HubStub({}) as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        for name, files in DATASETS.items():
            hub.commit(name, "main", files)
        yield hub


@pytest.mark.parametrize(
    ("source", "prompts", "column"),
    [
        ("pickapic", ["a cat", "a cow", "a dog"], ("user_id", [1, 2, 3])),
        ("parti", ['a "yes" sign', "a cat, asleep"], ("Note", [None, "fine"])),
        ("user/own", ["a cat"], ("tag", ["counting"])),
    ],
)
def test_sets_on_the_hub_are_fetched_once_and_nothing_beside_them(hub, monkeypatch, source, prompts, column):
    found = load_prompts(source)
    assert found["prompt"] == prompts and found[column[0]] == column[1]
    assert not [path for _, path, _ in hub.log if "/resolve/" in path and "train-0" in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert load_prompts(source)["prompt"] == prompts and not hub.log, "the second time it is there"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (None, "Repository Not Found"),
        ({"data/train-00000-of-00001-ef.parquet": b""}, "has no file data/test_unique-"),
        ({"data/test_unique-0.parquet": b"<html>log in</html>"}, "parquet|Parquet"),
        ({"data/test_unique-0.parquet": parquet(text=["a cat"])}, "caption"),
    ],
    ids=["no repository", "no file", "no parquet", "no column"],
)
def test_a_set_that_the_hub_has_not_is_one_line_with_what_helps(hub, files, told):
    name = SET_DATASETS["pickapic"][0]
    del hub.repos[name]
    if files is not None:
        hub.commit(name, "main", files)
    with pytest.raises(
        ValueError, match=f"the prompt set pickapic can't be fetched .*(?:{told}).*HF_ENDPOINT"
    ) as caught:
        load_prompts("pickapic")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no/such/dataset/at_all", "a b", "", "x" * 5000, "http://host/prompts"])
def test_what_is_no_source_is_refused_without_asking_the_hub(source):
    with pytest.raises(ValueError, match="is no prompt file, no set"):
        load_prompts(source)


def test_a_dataset_that_is_not_there_is_one_line(tmp_path):
    """Offline, as the tests are; before, the library's own errors of several kinds."""
    with pytest.raises(
        ValueError, match=r"'nobody/nothing', split 'test', can't be loaded: .*a set \(geneval"
    ) as caught:
        load_prompts("nobody/nothing:test")
    assert "\n" not in str(caught.value)
