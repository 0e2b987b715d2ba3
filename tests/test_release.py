"""What a release rests on: workflows that call what is there, one version everywhere, a tag that says it."""

import configparser
import re
import subprocess
import sys

import pytest
import yaml
from tiny import ROOT

import trl_tafs

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
CHECK = ROOT / ".ci" / "check_release.py"


def parsed(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs():
    """(file, name, job) of all workflows."""
    return [(path.name, name, job) for path in WORKFLOWS for name, job in parsed(path)["jobs"].items()]


def commands():
    """The shell lines of all workflows."""
    steps = [step for _, _, job in jobs() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def targets(line):
    """The targets that a line gives to make."""
    words = line.split()
    return [word for word in words[1:] if word[0] != "-" and "=" not in word] if words[:1] == ["make"] else []


def test_workflows_say_what_they_may_and_when_they_give_up():
    assert {path.stem for path in WORKFLOWS} >= {"ci", "release"}
    for path in WORKFLOWS:
        assert parsed(path)[True], path.name  # YAML reads the key `on` so
        assert parsed(path)["permissions"] == {"contents": "read"}, path.name
    assert not [(file, name) for file, name, job in jobs() if not job.get("timeout-minutes")]


def test_workflows_call_targets_that_exist():
    called = [target for line in commands() for target in targets(line)]
    there = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert called and set(called) <= there
    assert {"lint", "test", "test-lowest", "docs-site", "test-wheel", "check-release", "dist"} <= set(called)
    assert not [line for line in commands() if not targets(line)]  # nothing that a clone couldn't run as it stands


def test_each_target_is_phony_and_in_the_help():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split())
    named = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    helped = set(re.findall(r'@echo "make ([\w-]+)', text))
    assert named == phony and named - {"help", "setup"} == helped


def metadata():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_tested_pythons_are_those_that_are_promised():
    (tested,) = [job["strategy"]["matrix"]["python"] for _, _, job in jobs() if "strategy" in job]
    classifiers = re.findall(r"Python :: (3\.\d+)$", metadata()["metadata"]["classifiers"], re.MULTILINE)
    least, above = re.fullmatch(r">=3\.(\d+), <3\.(\d+)", metadata()["options"]["python_requires"]).groups()
    assert tested == classifiers == [f"3.{minor}" for minor in range(int(least), int(above))]
    steps = [step for _, _, job in jobs() for step in job["steps"]]
    given = {step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})}
    assert given - {"${{ matrix.python }}"} <= set(tested)
    (lowest,) = [job for _, name, job in jobs() if name == "lowest"]
    assert (
        lowest["steps"][1]["with"]["python-version"] == tested[0]
    )  # for later ones the lowest releases may have no wheels


def test_only_the_job_that_publishes_may_and_it_waits_for_the_tests():
    release = parsed(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    may = {name: job["permissions"] for name, job in release.items() if "permissions" in job}
    assert may == {"publish": {"id-token": "write"}}
    assert release["publish"]["needs"] == "build" and release["publish"]["environment"] == "pypi"
    order = [target for step in release["build"]["steps"] for target in targets(step.get("run", ""))]
    assert order == ["check-release", "lint", "test", "dist", "test-wheel"]


def test_the_citation_is_of_this_package():
    citation = parsed(ROOT / "CITATION.cff")
    assert (citation["title"], citation["version"]) == (metadata()["metadata"]["name"], trl_tafs.__version__)
    assert citation["license"] == metadata()["metadata"]["license"]
    assert citation["references"][0]["url"].rpartition("/")[2] in (ROOT / "README.md").read_text()


def tree(folder, version="1.2.3", cited="1.2.3", heading="1.2.3 (2026-03-04)"):
    """What the check reads, and the check."""
    for name, text in {
        "trl_tafs/__init__.py": f'"""T."""\n\n__version__ = "{version}"\n',
        "CITATION.cff": f"title: trl_tafs\nversion: {cited}\n",
        "CHANGELOG.md": f"# Changelog\n\n## {heading}\n\n- A.\n\n## 1.2.2 (2026-01-01)\n",
        ".ci/check_release.py": CHECK.read_text(),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / ".ci" / "check_release.py"


def checked(script, *arguments):
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_a_tag_of_the_tree_is_accepted(tmp_path):
    assert checked(tree(tmp_path), "v1.2.3") == (0, ["the tree is v1.2.3"])


@pytest.mark.parametrize(
    ("changes", "tag", "told"),
    [
        ({}, "v1.2.4", ["the tag is v1.2.4, and trl_tafs.__version__ 1.2.3", "CHANGELOG.md has no heading '## 1.2.4"]),
        ({}, "1.2.3", ["the tag is 1.2.3, and", "CHANGELOG.md has no heading"]),
        ({"cited": "1.2.2"}, "v1.2.3", ["CITATION.cff says version 1.2.2"]),
        ({"heading": "1.2.3 (unreleased)"}, "v1.2.3", ["CHANGELOG.md has no heading '## 1.2.3 (YYYY-MM-DD)'"]),
        ({"heading": "1.2.30 (2026-03-04)"}, "v1.2.3", ["CHANGELOG.md has no heading"]),
        ({}, "v1.2.2", ["the tag is v1.2.2"]),
    ],
)  # fmt: skip
def test_a_tag_that_the_tree_is_not_is_refused(tmp_path, changes, tag, told):
    code, lines = checked(tree(tmp_path, **changes), tag)
    assert code == 1 and [line[: len(start)] for line, start in zip(lines, told, strict=True)] == told


def test_the_present_tree_is_unreleased_or_dated():
    """Its heading is of the package's version, so that only the date is left to be written."""
    first = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == trl_tafs.__version__


def test_issue_forms_are_whole_and_ask_for_the_environment():
    forms = {path.stem: parsed(path) for path in FORMS if path.stem != "config"}
    assert set(forms) == {"bug", "question"}
    for name, form in forms.items():
        assert {"name", "description", "body"} <= form.keys()
        ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
        assert len(ids) == len(set(ids)), name
        (asked,) = [item["attributes"]["label"] for item in form["body"] if item.get("id") == "environment"]
        assert "`trl-tafs env`" in asked
    assert parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": False}


def test_hooks_before_a_commit_are_those_of_make_lint():
    (repo,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["entry"].partition(" --")[0].removeprefix(".venv/") for hook in repo["hooks"]}
    lines = re.search(r"^lint: .*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].splitlines()
    lint = {re.sub(r" (\.|--\w+)", "", line.strip().replace("$(BIN)", "bin")) for line in lines}
    assert hooks == lint
