"""The notebooks: they parse, they are those that docs/start.md names, and each teaches what it says."""

import ast
import importlib
import re

import pytest
from notebooks import FOLDER, load, run
from tiny import ROOT

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes, with the pictures that they show


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_table_of_the_first_run_is_the_folder():
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+\.ipynb)` \|", text, re.MULTILINE)) == [path.name for path in NOTEBOOKS] != []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_compile_and_name_what_the_package_has(path):
    for cell in code(load(path)):
        for node in ast.walk(ast.parse(cell.source, filename=path.name)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_tafs":
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_begins_with_what_it_is_and_how_to_install_it(path):
    first = load(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "pip install '.[notebooks]'" in first.source and "clone" in first.source and path.name in first.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_ran_without_errors_and_without_names_of_a_machine(path):
    """Run from the top, in order; small; no path of the machine that ran it."""
    cells = code(load(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert path.stat().st_size < LARGEST
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [text for text in texts if re.search(r"(?<![\w.<])/(?:[a-z]\w*/)+\w|0x[0-9a-fA-F]{6}", text)]


def shown(name, folder, *expressions):
    return run(FOLDER / f"{name}.ipynb", folder, expressions)[1]


@pytest.mark.slow
def test_one_iteration_by_hand_is_the_trainer_s(tmp_path):
    loss, logged = "by_hand.loss.item()", "logged['loss']"
    found = shown(
        "one_iteration", tmp_path, "same_rewards", loss, logged, "agreement", "rewards.mean(0).tolist()", "result"
    )
    assert found["same_rewards"] is True
    assert found[loss] == pytest.approx(found[logged], abs=1e-6)
    assert found["agreement"] > 0.2  # predictions go to what compared well, and away from what didn't
    means = found["rewards.mean(0).tolist()"]
    assert means == sorted(means)  # later guesses are better ones
    assert found["result"] > means[-1]  # one update, the same noise


@pytest.mark.slow
def test_a_reward_alone_is_hacked_and_with_a_second_one_it_is_not(tmp_path):
    name, curve = "found", "curve('bold_and_legible', 'eval/annealed_4/held_out')"
    found = shown("your_own_reward", tmp_path, name, curve)
    rows = found[name]
    assert rows["boldness alone"]["ink"] > rows["base"]["ink"] + 0.05
    assert rows["boldness alone"]["read as asked"] < 0.2 < rows["base"]["read as asked"]
    assert rows["both"]["read as asked"] > 0.85 and rows["both"]["ink"] > rows["base"]["ink"] + 0.01
    assert found[curve][-1][1] > found[curve][0][1] + 0.3


@pytest.mark.slow
def test_plain_diffusers_draws_what_the_package_draws(tmp_path):
    shares = "{name: share for name, (share, _) in ways.items()}"
    levels = "pipe.scheduler.sigmas.tolist()"
    found = shown("plain_diffusers", tmp_path, "difference", "by_generator", "by_global", shares, levels)
    assert found["difference"] == 0.0
    assert (found["by_generator"], found["by_global"]) == (False, True)
    assert found[shares]["as trained"] > found[shares]["no adapter"] + 0.3
    assert found[levels] == [1.0, 0.75, 0.5, 0.25, 0.0]
