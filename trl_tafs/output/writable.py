"""Whether a folder can be written, found out before what is to be written there is made."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(folder: str | os.PathLike, field: str) -> None:
    """Make a folder if it is missing, and write and remove an empty file there.

    Args:
        folder: the folder.
        field: the option that names it, for the error.

    Raises:
        ValueError: it can't be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(folder)):
            pass
    except OSError as error:
        raise ValueError(
            f"{field} is {str(folder)!r}, which can't be written ({error.strerror}); give another"
        ) from error
