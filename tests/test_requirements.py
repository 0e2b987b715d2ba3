"""What is imported is what setup.cfg asks for: nothing is there by chance only, and nothing is asked for in vain."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from typing import NamedTuple

import pytest
from tiny import ROOT

# A requirement that no file of ours imports says in its comment who needs it: another's module, a target, or a file.
NEEDED_BY = re.compile(r"(?:needed|loaded|run) by (?:make (?P<target>[\w-]+)|(?P<file>\S+\.py)|(?P<module>\w+))")
BY_CHANCE = {
    "tests/rewards/parity/freeze.py",  # a script that installs what it compares with
    "tests/rewards/parity/freeze_hps_v3.py: hpsv3",  # another
    "tests/rewards/parity/freeze_edit_reward.py: EditReward",  # another
    "tests/training/test_memory.py: torchao",  # by importorskip
}

BY_NAME = {"require", "import_module", "importlib.import_module"}  # functions that import what they are given


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


BRINGS = {module: {normal(name) for name in names} for module, names in packages_distributions().items()}


def brought_by(module):
    """The distributions that bring a module; where it isn't installed, the one of its name."""
    return BRINGS.get(module, {normal(module)})


class Imports(NamedTuple):
    """A file's third parties: imported with it, and when one of its functions runs."""

    at_once: set
    later: set


def imports(path, own):
    found = Imports(set(), set())

    def walk(node, modules):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                modules.update(name.name.partition(".")[0] for name in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                modules.add(child.module.partition(".")[0])
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in BY_NAME:
                modules.update(
                    name.value.partition(".")[0] for name in child.args[:1] if isinstance(name, ast.Constant)
                )
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            walk(child, found.later if function else modules)

    walk(ast.parse(path.read_text()), found.at_once)
    return Imports(*(modules - own for modules in found))


@pytest.fixture(scope="module")
def files():
    """{path: Imports} of the package, the examples and the tests."""
    paths = [path for folder in ("trl_tafs", "examples", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    own = {"trl_tafs", *sys.stdlib_module_names, *(path.stem for path in paths), *(path.parent.name for path in paths)}
    found = {str(path.relative_to(ROOT)): imports(path, own) for path in paths}
    return {path: modules for path, modules in found.items() if path not in BY_CHANCE}


def requirements(text):
    """{name: the comment above it} of a list in setup.cfg."""
    found, comment = {}, ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            comment = f"{comment} {line.lstrip('# ')}".strip()
        elif line and not line.startswith("trl_tafs["):
            found[normal(re.match(r"[\w.-]+", line)[0])] = comment
            comment = ""
    return found


@pytest.fixture(scope="module")
def declared():
    """{"" for what is always there, or an extra: {requirement: comment}}."""
    parser = configparser.ConfigParser(comment_prefixes=("\0",), allow_no_value=True)  # comments are kept
    parser.read_string((ROOT / "setup.cfg").read_text())
    extras = {name: text for name, text in parser["options.extras_require"].items() if not name.startswith("#")}
    lists = {"": parser["options"]["install_requires"], **extras}
    return {name: requirements(text) for name, text in lists.items()}


def undeclared(files, folder, at_once, later):
    """`file: module` of a folder's imports that these requirements don't bring."""
    found = []
    for path, modules in files.items():
        if path.startswith(f"{folder}/"):
            found += [f"{path}: {m}" for m in sorted(modules.at_once) if not brought_by(m) & set(at_once)]
            found += [f"{path}: {m}" for m in sorted(modules.later) if not brought_by(m) & set(later)]
    return [line for line in found if line not in BY_CHANCE]


def test_the_package_imports_what_it_requires_and_of_the_extras_only_inside_functions(files, declared):
    extras = {name for requirements in declared.values() for name in requirements} - set(declared["dev"])
    assert undeclared(files, "trl_tafs", declared[""], declared[""] | dict.fromkeys(extras)) == []


def test_the_examples_and_the_tests_import_what_their_extras_bring(files, declared):
    examples = declared[""] | declared["quickstart"]
    assert undeclared(files, "examples", examples, examples) == []
    whole = {name: "" for extra, requirements in declared.items() for name in requirements}
    assert undeclared(files, "tests", whole, whole) == []


def is_needed(name, comment, imported):
    """Whether a comment says who needs a requirement, and it's so."""
    by = NEEDED_BY.search(comment)
    if by is None:
        return False
    if by["target"]:
        return f"\n{by['target']}:" in (ROOT / "Makefile").read_text()
    if by["file"]:
        return any(f'"{module}"' in (ROOT / by["file"]).read_text() for module in (name, name.replace("-", "_")))
    return by["module"] in imported


def test_every_requirement_is_imported_or_says_who_needs_it(files, declared):
    imported = set().union(*(modules.at_once | modules.later for modules in files.values()))
    brought = set().union(*map(brought_by, imported))
    pairs = [pair for requirements in declared.values() for pair in requirements.items()]
    assert [name for name, comment in pairs if name not in brought and not is_needed(name, comment, imported)] == []
