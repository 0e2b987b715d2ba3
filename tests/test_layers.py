"""Imports run one way: folders by a table, files without a circle, heavy libraries where they are used."""

import ast
import sys

import pytest
from tiny import ROOT

from trl_tafs.pipelines.families import FAMILIES

# For each folder and each file at the top, in order: which of those before it its files may import.
MAY_IMPORT = {
    "output": set(),
    "presets": {"output"},
    "options": {"output"},
    "processes": {"output"},
    "method": {"options", "output"},
    "algorithm": {"method"},  # takes levels and a shape, no pipeline
    "pipelines": {"method", "options", "output"},
    "rewards": {"options", "output"},
    "prompts": {"method", "options", "output", "pipelines", "rewards"},
    "policy": {"method", "options", "output", "pipelines"},
    "evaluation": {"method", "output", "pipelines", "policy", "processes", "prompts", "rewards"},
    "training": {"algorithm", "method", "options", "output", "pipelines", "policy", "processes", "prompts", "rewards"},
    "hub": {"evaluation", "method", "options", "output", "pipelines", "policy", "processes", "rewards", "training"},
    "config": {"hub", "method", "options", "output", "presets", "training"},
}
MAY_IMPORT["report"] = {"config", "output", "training"}
MAY_IMPORT["trainer"] = set(MAY_IMPORT) - {"presets"}
MAY_IMPORT["trl_tafs"] = set(MAY_IMPORT)  # the package itself, lazily
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}

# Within the mathematics: which files a file may import.
METHOD = {
    "types": set(),
    "levels": {"papers"},
    "noise": {"types"},
    "guidance": set(),
    "papers": set(),
    "parts": {"papers"},
    "losses": {"types"},
    "credit": {"types", "papers", "parts"},
    "advantages": {"types", "credit"},
    "allocation": {"noise", "advantages"},
    "kernels": {"types", "levels", "papers", "parts"},
    "rollout": {"types", "levels", "noise", "kernels"},
    "objective": {"types", "levels", "noise", "losses", "kernels", "rollout", "parts"},
    "image_objectives": {"types", "levels", "noise", "losses", "kernels", "rollout", "papers", "objective"},
    "objectives": {"types", "levels", "noise", "losses", "kernels", "rollout", "objective", "image_objectives"},
}
METHOD["distribution"] = {"levels", "noise", "papers", "kernels"}
METHOD["distribution_options"] = set()
METHOD["superflow"] = {"noise", "papers", "advantages", "allocation"}
METHOD["sampling_options"] = {"kernels", "levels"}
METHOD["options"] = set(METHOD)

HEAVY = {"diffusers", "transformers", "open_clip", "accelerate", "peft", "trl", "datasets", "huggingface_hub"}
HEAVY |= {"jinja2", "rapidocr", "onnxruntime", "httpx2", "starlette", "uvicorn", "openai", "matplotlib", "sklearn"}
LIGHT = (
    "config",
    "algorithm",
    "presets",
    "processes",
    "method",
    "rewards",
    "output",
    "prompts.source",
    "training.plan",
)

# What breaks a rule today, and why; nothing else may, and what no longer does must go from here.
KNOWN: dict[str, str] = {}


def modules(folder):
    """Each module of a package by its dotted name below it; the package itself by its own name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or folder.name] = path
    return found


def imports(path, lazy=True):
    """Dotted names that a file imports, under TYPE_CHECKING too; `lazy`: within functions too."""
    found, stack = set(), list(ast.parse(path.read_text()).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide a layer"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            stack.extend(node.orelse if checking and not lazy else ast.iter_child_nodes(node))
    return found


def graph(folder):
    """Each module of a package with those of its modules that it imports."""
    known = modules(folder)

    def resolve(name):
        """The module that `package.a.b.attribute` lies in."""
        below = name.removeprefix(f"{folder.name}.") if name != folder.name else folder.name
        while below not in known and "." in below:
            below = below.rpartition(".")[0]
        return below if below in known else folder.name

    names = {name: [i for i in imports(path) if i.partition(".")[0] == folder.name] for name, path in known.items()}
    return {name: {resolve(imported) for imported in found} - {name} for name, found in names.items()}


def circles(edges):
    """Sets of modules that import each other in a circle, as `a <-> b`."""
    reached = {}
    for start in edges:
        stack, seen = list(edges[start]), set()
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack.extend(edges.get(name, ()))
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in edges if a in reached[a]}
    return [" <-> ".join(group) for group in sorted(groups)]


def unit(name):
    """The folder, or the file at the top, that a module is of."""
    return name.partition(".")[0]


def new(offenders, kind):
    """Offenders that aren't known, and known ones of the kind that no longer offend."""
    known = {name for name in KNOWN if f" {kind} " in name}
    return sorted(set(offenders) - known), sorted(known - set(offenders))


PACKAGE = ROOT / "trl_tafs"
MODULES = modules(PACKAGE)
GRAPH = graph(PACKAGE)


def foreign(name, **options):
    """Top-level packages outside the standard library and this package that a module imports."""
    tops = {imported.partition(".")[0] for imported in imports(MODULES[name], **options)}
    return tops - set(sys.stdlib_module_names) - {"trl_tafs"}


def below(*units):
    return [name for name in MODULES if any(f"{name}.".startswith(f"{u}.") for u in units)]


def test_the_table_runs_one_way_and_names_every_folder():
    order = list(MAY_IMPORT)
    assert all(allowed <= set(order[: order.index(name)]) for name, allowed in MAY_IMPORT.items())
    assert {unit(name) for name in MODULES} <= set(order), "a new folder or file at the top: give it a place"


def test_a_folder_imports_those_below_it_alone():
    offenders = [
        f"{name} -> {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if unit(imported) not in {unit(name), *MAY_IMPORT[unit(name)]}
    ]
    assert new(offenders, "->") == ([], [])


def test_no_file_is_in_a_circle():
    assert new(circles(GRAPH), "<->") == ([], [])


@pytest.mark.parametrize(
    "back",
    [
        "from planted.a import A",
        "import planted.a",
        "from planted import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planted.a import A",
        "import typing\nif typing.TYPE_CHECKING:\n    from planted import a",
        "def f():\n    from planted.a import A",
        "from planted.c.d import D",
    ],
)
def test_a_planted_circle_is_found(tmp_path, back):
    folder = tmp_path / "planted"
    (folder / "c").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from planted.b import B\n")
    (folder / "b.py").write_text("B = 1\n")
    (folder / "c" / "__init__.py").write_text("from planted.c.d import D\n")
    (folder / "c" / "d.py").write_text("from planted.a import A\n")
    assert circles(graph(folder)) == []
    (folder / "b.py").write_text(f"{back}\n")
    assert circles(graph(folder)) == ["a <-> b <-> c.d" if "c.d" in back else "a <-> b"]


def test_the_maths_needs_torch_alone_and_imports_one_way():
    offenders = {name: foreign(name) - {"torch"} for name in below("method")}
    assert not {name: found for name, found in offenders.items() if found}
    own = {name.removeprefix("method."): found for name, found in GRAPH.items() if name.startswith("method.")}
    assert own.keys() <= METHOD.keys(), "a new file of the mathematics: give it a place in METHOD"
    own = {name: {i.removeprefix("method.") for i in found if unit(i) == "method"} for name, found in own.items()}
    assert not {name: found - METHOD[name] for name, found in own.items() if found - METHOD[name]}


def test_a_family_knows_no_other_family():
    families = {module.removeprefix("trl_tafs.") for module in FAMILIES.values()}
    assert len(families) >= 7
    others = families | {"pipelines", "pipelines.auto"}
    assert not {name: GRAPH[name] & others for name in families if GRAPH[name] & others}


def test_the_package_itself_imports_nothing_before_it_is_asked():
    allowed = {"importlib.import_module", "typing.TYPE_CHECKING", "typing.Any", "__future__.annotations"}
    allowed |= {"trl_tafs.pipelines.families.FAMILIES"}  # a table of names
    assert imports(MODULES["trl_tafs"], lazy=False) <= allowed


def test_heavy_libraries_are_loaded_where_they_are_used():
    light = [*below(*LIGHT), *(name for name in MODULES if name.rpartition(".")[2] == "options")]
    offenders = {name: foreign(name, lazy=False) & HEAVY for name in light}
    assert not {name: found for name, found in offenders.items() if found}


def test_no_file_imports_privates_of_trl_or_the_trainer_of_transformers():
    found = [(name, imported.split(".")) for name, path in MODULES.items() for imported in imports(path)]
    foreign = [(name, parts) for name, parts in found if parts[0] in ("trl", "transformers")]
    assert foreign
    offenders = [
        (name, ".".join(parts))
        for name, parts in foreign
        if any(part.startswith("_") for part in parts[1:]) or parts == ["transformers", "Trainer"]
    ]
    assert not offenders
