"""Run the notebooks of examples/notebooks/ and keep what they show: `make notebooks`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
SHOWN = "[shown to the test] "


def load(path: Path) -> Any:
    """A notebook, of format 4."""
    return nbformat.read(path, as_version=4)


def run(path: Path, folder: Path, names: tuple[str, ...] = ()) -> tuple[Any, dict[str, Any]]:
    """Execute a notebook in a new kernel that starts beside a clone, in `folder`.

    Args:
        path: the notebook.
        folder: where its kernel starts; empty.
        names: of expressions that are asked for at the end, as JSON holds them.

    Returns:
        The notebook with what it shows, and the values of `names`.
    """
    (folder / "trl_tafs").symlink_to(ROOT)
    notebook = load(path)
    asked = "{" + ", ".join(f"{name!r}: {name}" for name in names) + "}"
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print({SHOWN!r} + json.dumps({asked}))"))
    start = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=start)
    last = notebook.cells.pop()
    told = "".join(output.get("text", "") for output in last.outputs)
    return notebook, json.loads(told[told.index(SHOWN) + len(SHOWN) :])


def kept(notebook: Any) -> Any:
    """The notebook as it is stored: what it shows, without the times and the addresses of this run."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in merged(cell.outputs) if "WARNING | Kernel" not in output.get("text", "")
            ]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def merged(outputs: list[Any]) -> list[Any]:
    """Lines that came one after the other to the same stream, as one."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == "stream" == found[-1].output_type and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main() -> None:
    """Run those that are named, or all, and store them."""
    for path in [FOLDER / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook, _ = run(path, Path(folder))
        nbformat.write(kept(notebook), path)
        print(path.relative_to(ROOT), f"{path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
