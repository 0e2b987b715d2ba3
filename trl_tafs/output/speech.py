"""What a run says: through the logger `trl_tafs`, and on a terminal or in a notebook of itself."""

from __future__ import annotations

import logging
import os
import sys

from trl_tafs.output.secrets import hide

logger = logging.getLogger("trl_tafs")
VARIABLE = "TRL_TAFS_VERBOSITY"  # info: speak without a terminal, too; warning: warnings alone


def on_terminal() -> bool:
    """Return whether somebody looks on: standard error is a terminal or a notebook's, or the variable says so."""
    wanted = os.environ.get(VARIABLE, "").lower()
    if wanted:
        return wanted in ("info", "debug")
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())


def is_heard() -> bool:
    """Return whether anybody would read a line of information."""
    return logger.isEnabledFor(logging.INFO) or (_speaks_itself() and on_terminal())


def say(line: str) -> None:
    """Say a line of information: to the handlers that the user's `logging` has, else on the terminal, else nowhere."""
    line = hide(line)
    if _speaks_itself() and on_terminal():
        _write(line)
    else:
        logger.info(line)


def warn(line: str) -> None:
    """Say that something looks wrong; without a terminal `logging` brings it to standard error."""
    line = hide(line)
    if _speaks_itself() and on_terminal():
        _write(f"warning: {line}")
    else:
        logger.warning(line)


def _speaks_itself() -> bool:
    """Return whether the user has set no handler or level, which would decide instead."""
    return not logger.handlers and not logging.getLogger().handlers and logger.level == logging.NOTSET


def _write(line: str) -> None:
    """Write above progress bars, which stay whole."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
