"""The page: one file, nothing from anywhere else, no text of a user's that acts as markup."""

import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from tiny import ROOT

from trl_tafs.report.write import ASSETS, write_report

UPLOT = "5b16e85a17eecc7bac76f68229682e426083ee3f"


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    VOID = {"meta", "input", "img", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.data = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data):
        if (
            self.open
            and self.elements[-1] == ("script", {"type": "application/json", "id": "data"})
            and self.open[-1] == "script"
        ):
            self.data += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(trained):
    return Page((trained / "report.html").read_text())


def test_a_run_leaves_one_whole_page(page):
    assert page.open == [] and [tag for tag, _ in page.elements][:2] == ["html", "head"]
    assert {"pictures", "curves", "time", "settings"} <= {a.get("id") for a in page.all("section")}


def test_nothing_is_loaded_from_anywhere(page):
    sources = [a["src"] for tag, a in page.elements if "src" in a]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert all(a["href"].startswith("#") for tag, a in page.elements if "href" in a) and not page.all("link")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    styles = "".join((ASSETS / name).read_text() for name in ("report.css", "uPlot.min.css"))
    assert not re.search(r"url\(|@import", styles)


def test_a_prompt_is_text_and_no_markup(page, hostile):
    assert not [a for a in page.all("img") if "onerror" in a]
    assert hostile in json.loads(page.data)["strips"][0]["prompts"]
    assert any(hostile in a.get("alt", "") for a in page.all("img"))


def test_every_chart_and_picture_of_the_data_has_its_place(page):
    data = json.loads(page.data)
    plots = [int(a["data-chart"]) for a in page.all("div") if "data-chart" in a]
    assert plots == list(range(len(data["charts"]))) and len(plots) >= 10
    for chart in data["charts"]:
        assert len(chart["data"]) == len(chart["series"]) + 1 and len({len(row) for row in chart["data"]}) == 1
    slider = next(a for a in page.all("input") if a.get("type") == "range")
    assert slider["max"] == str(len(data["strips"][0]["epochs"]) - 1)


def test_it_can_be_read_by_everyone(page):
    assert all(a.get("alt") for a in page.all("img")) and page.all("html")[0]["lang"] == "en"
    assert all("aria-label" in a for a in page.all("button") + page.all("input"))
    assert any("width=device-width" in a.get("content", "") for a in page.all("meta"))


def test_several_runs_stand_side_by_side(trained, run, tmp_path):
    (run / "config.json").write_text((run / "config.json").read_text().replace('"first"', '"second"'))
    page = Page(write_report([trained, run], tmp_path / "both.html").read_text())
    labels = [series["label"] for series in json.loads(page.data)["charts"][0]["series"]]
    assert labels == ["first", "second"] and len(json.loads(page.data)["strips"]) == 2
    same = Page(write_report([trained, trained], tmp_path / "same.html").read_text())
    assert [s["label"] for s in json.loads(same.data)["charts"][0]["series"]] == [str(trained)] * 2


def test_a_report_is_small(trained):
    assert (trained / "report.html").stat().st_size < 200_000


def test_the_chart_library_is_what_its_authors_published():
    found = hashlib.sha1((ASSETS / "uPlot.iife.min.js").read_bytes()).hexdigest()
    assert found == UPLOT, "uPlot 1.6.32's own file; a newer one goes there whole, with its licence"
    assert (
        "MIT" in (ASSETS / "uPlot.LICENSE").read_text()
        or "Permission is hereby granted" in (ASSETS / "uPlot.LICENSE").read_text()
    )
    assert "report/assets/*" in (ROOT / "setup.cfg").read_text()
