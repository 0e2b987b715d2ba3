import ast
import sys

import pytest
from tiny import ROOT

PACKAGE = ROOT / "trl_tafs"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
BOTTOM = ("types", "schedules", "advantages", "losses")
MATHS = (*BOTTOM, "kernels", "rollout", "objectives")


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path, lazy=True, checking=False):
    """Module names that a file imports; `lazy`: within functions too, `checking`: under TYPE_CHECKING too."""
    found, stack = set(), list(ast.parse(path.read_text()).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide a layer"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif is_type_checking(node) and not checking:
            stack.extend(node.orelse)
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def own(path, **options):
    """Names, below trl_tafs, of the package's modules that a file imports."""
    names = {name for name in imports(path, **options) if name in MODULES}
    return {name.removeprefix("trl_tafs").removeprefix(".") for name in names} - {""}


def foreign(path, **options):
    """Top-level packages outside the standard library and this package."""
    return {name.partition(".")[0] for name in imports(path, **options)} - set(sys.stdlib_module_names) - {"trl_tafs"}


def modules_below(folder):
    return [name for name in MODULES if name.startswith(f"trl_tafs.{folder}.")]


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_needs_torch_alone(name):
    assert foreign(MODULES[f"trl_tafs.{name}"], checking=True) == {"torch"}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("types", set()),
        ("schedules", set()),
        ("advantages", {"types"}),
        ("losses", {"types"}),
        ("kernels", {"types", "schedules"}),
        ("rollout", {"types", "schedules", "kernels"}),
        ("objectives", set(BOTTOM) | {"kernels", "rollout"}),
    ],
)
def test_the_maths_imports_one_way(name, allowed):
    assert own(MODULES[f"trl_tafs.{name}"], checking=True) <= allowed


@pytest.mark.parametrize("name", [name for name in modules_below("pipelines") if not name.endswith(".auto")])
def test_a_family_knows_the_maths_and_its_base_alone(name):
    assert own(MODULES[name], checking=True) <= {*MATHS, "pipelines", "pipelines.base", "pipelines.schedulers"}


@pytest.mark.parametrize("name", modules_below("rewards"))
def test_a_reward_knows_neither_trainer_nor_pipeline(name):
    known = own(MODULES[name], checking=True)
    assert known <= {"types", "rewards", "web"} | {name for name in known if name.startswith("rewards.")}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("trl_tafs.cli", "trl_tafs.trainer")])
def test_nothing_imports_the_trainer_but_the_command_line(name):
    assert "trainer" not in own(MODULES[name])
    assert "cli" not in own(MODULES[name], checking=True)


def test_the_trainer_is_named_for_type_checkers_by_the_package_and_the_report_alone():
    naming = {name for name, path in MODULES.items() if "trainer" in own(path, checking=True)}
    assert naming - {"trl_tafs.cli"} <= {"trl_tafs", "trl_tafs.training.report"}


def test_the_package_itself_imports_nothing_before_it_is_asked():
    assert imports(MODULES["trl_tafs"], lazy=False) <= {
        "importlib", "importlib.import_module", "typing", "typing.TYPE_CHECKING", "typing.Any",
        "trl_tafs.pipelines.families", "trl_tafs.pipelines.families.FAMILIES",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["rewards", "config", "groups", "prompts", *(n.removeprefix("trl_tafs.") for n in modules_below("rewards"))]
)
def test_heavy_libraries_are_loaded_where_they_are_used(name):
    heavy = {"diffusers", "transformers", "open_clip", "accelerate", "peft", "trl", "datasets", "huggingface_hub"}
    heavy |= {"rapidocr", "onnxruntime", "httpx2", "starlette", "uvicorn", "openai", "matplotlib", "sklearn"}
    assert not foreign(MODULES[f"trl_tafs.{name}"], lazy=False) & heavy


def test_there_is_no_circle():
    graph = {name.removeprefix("trl_tafs."): own(path) for name, path in MODULES.items() if name != "trl_tafs"}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done or name not in graph:
            return
        path.append(name)
        for needed in sorted(graph[name]):
            if not (name in ("pipelines", "rewards") and needed.startswith(name)):
                visit(needed)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("name", MODULES)
def test_no_file_imports_privates_of_trl_or_the_trainer_of_transformers(name):
    for imported in imports(MODULES[name]):
        top, _, rest = imported.partition(".")
        if top in ("trl", "transformers"):
            assert not any(part.startswith("_") for part in rest.split("."))
            assert imported != "transformers.Trainer"
