"""How long a file, a class and a function may be: what can be read in one sitting."""

import ast

from tiny import ROOT

CLASS, FUNCTION = 200, 100
FILES = {"trainer.py": 300}

# Longer, and why; nothing else may be, and what no longer is must go from here.
KNOWN: dict[str, str] = {
    "TAFSPipelineMixin": "what a family may override, documented in one place (docs/new_family.md)",
}


def too_long(source):
    """Names of the classes and functions above their limit."""
    limits = {ast.ClassDef: CLASS, ast.FunctionDef: FUNCTION, ast.AsyncFunctionDef: FUNCTION}
    nodes = [node for node in ast.walk(ast.parse(source)) if type(node) in limits]
    return [node.name for node in nodes if node.end_lineno - node.lineno + 1 > limits[type(node)]]


def test_classes_functions_and_the_trainer_are_short():
    files = sorted((ROOT / "trl_tafs").rglob("*.py"))
    found = {name for path in files for name in too_long(path.read_text())}
    found |= {name for name, most in FILES.items() if len((ROOT / "trl_tafs" / name).read_text().splitlines()) > most}
    assert (sorted(found - KNOWN.keys()), sorted(KNOWN.keys() - found)) == ([], [])


def test_a_long_class_and_a_long_function_are_found():
    def lines(count):
        return "\n".join("    x = 1" for _ in range(count))

    assert too_long(f"class A:\n{lines(CLASS - 1)}\nasync def b():\n{lines(FUNCTION - 1)}") == []
    assert too_long(f"class A:\n{lines(CLASS)}\nasync def b():\n{lines(FUNCTION)}") == ["A", "b"]
