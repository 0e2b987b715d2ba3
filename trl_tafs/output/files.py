"""Files that are written whole or not at all, and what a disk's fault looks like."""

from __future__ import annotations

import os
from pathlib import Path


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)


def is_disk_fault(error: BaseException) -> bool:
    """Whether a write failed at the disk: torch and safetensors say so in errors of their own."""
    own = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error) or "os error" in str(error)
    return isinstance(error, OSError) or own
