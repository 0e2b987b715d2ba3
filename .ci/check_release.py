"""Is the tree what a tag says? `make check-release TAG=v0.1.0`: one version, and changes with a date."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def found(pattern: str, path: Path) -> str | None:
    """The group of a pattern's first match in a file."""
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return match and match[1]


def faults(tag: str, root: Path = ROOT) -> Iterator[str]:
    """What doesn't fit the tag, each with its remedy."""
    version = found(r'^__version__ = "([^"]+)"$', root / "trl_tafs" / "__init__.py")
    if tag != f"v{version}":
        yield f"the tag is {tag}, and trl_tafs.__version__ {version}; tag v{version}, or set __version__"
    cited = found(r"^version: (\S+)$", root / "CITATION.cff")
    if cited != version:
        yield f"CITATION.cff says version {cited}, and trl_tafs.__version__ {version}; make them equal"
    if not re.search(rf"^## {re.escape(tag[1:])} \(\d{{4}}-\d\d-\d\d\)$", (root / "CHANGELOG.md").read_text(), re.M):
        yield f"CHANGELOG.md has no heading '## {tag[1:]} (YYYY-MM-DD)'; write the date in the place of 'unreleased'"


def main() -> int:
    """1, and what is wrong, where something is."""
    told = list(faults(sys.argv[1])) if len(sys.argv) == 2 else ["no tag is given; make check-release TAG=v0.1.0"]
    print("\n".join(told) or f"the tree is {sys.argv[1]}")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
