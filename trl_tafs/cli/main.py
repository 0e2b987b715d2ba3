"""The `trl-tafs` command: one function a subcommand, errors in one line."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from trl_tafs.cli.parsing import UsageError
from trl_tafs.output.errors import did_you_mean, one_line, shown


class Command(NamedTuple):
    """A command: where it is, and what it does."""

    topic: str
    summary: str
    module: str  # of trl_tafs.cli
    function: str

    def load(self) -> Callable[[Sequence[str]], Callable[[], int | None]]:
        """Import it."""
        return getattr(import_module(f"trl_tafs.cli.{self.module}"), self.function)


COMMANDS = {
    "quickstart": Command(
        "Begin", "train a tiny generator of digits on this machine, in minutes", "quickstart", "quickstart"
    ),
    "env": Command("Begin", "print versions and devices, to paste into an issue", "environment", "env"),
    "plan": Command("Train", "what a run needs of GPU, host and disk, without loading weights", "plan", "plan"),
    "doctor": Command("Train", "try one rollout and one update, and say what is wrong", "doctor", "doctor"),
    "train": Command("Train", "train an adapter for any rewards", "train", "train"),
    "serve-reward": Command("Train", "serve a reward to trainers elsewhere", "serve", "serve_reward"),
    "report": Command("Look", "one HTML page of a run, or of several side by side", "report", "report"),
    "sample": Command("Look", "draw images with an adapter", "sample", "sample"),
    "evaluate": Command("Look", "compare adapters and their base: tables, grids, plots", "evaluate", "evaluate"),
    "push": Command("Publish", "push an adapter's folder to the Hub", "push", "push"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 for what can't be, 2 for what isn't understood, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        from trl_tafs import __version__

        print(f"trl_tafs {__version__}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        return _usage(argv)
    usual = warnings.formatwarning
    warnings.formatwarning = _warning_line
    try:
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        return _say(argv[0], "interrupted", 130)
    except SystemExit as end:  # after --help; a server's
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        warnings.formatwarning = usual


def _warning_line(message: Warning | str, category: type[Warning], filename: str, *place: Any, **line: Any) -> str:
    """Return a warning as a user reads it; of a programmer's kind, with the place."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return f"{category.__name__}: {message} ({filename})\n"


def _usage(argv: Sequence[str]) -> int:
    asked = bool(argv) and argv[0] in ("-h", "--help", "--help-all")
    if argv and not asked:
        known = did_you_mean(argv[0], [*COMMANDS, "--version", "--help"])
        print(f"trl-tafs: there is no command {shown(argv[0])}{known}", file=sys.stderr)
    print("usage: trl-tafs COMMAND [options]; trl-tafs COMMAND --help; trl-tafs --version")
    topic = ""
    for name, command in COMMANDS.items():
        if command.topic != topic:
            topic = command.topic
            print(f"\n{topic}")
        print(f"  {name:13} {command.summary}")
    return 0 if asked else 2


def _run(name: str, argv: Sequence[str]) -> int:
    """Set up, then work: whatever a user can mend is one line, any other error is shown whole."""
    from trl_tafs.hub.push import PushError
    from trl_tafs.pipelines.finite import NonFiniteError
    from trl_tafs.rewards.scoring import RewardError
    from trl_tafs.training.checkpoint_files import CheckpointError
    from trl_tafs.training.run_folder import RunFolderError

    refused: tuple[type[Exception], ...] = (RewardError, NonFiniteError, CheckpointError, PushError, RunFolderError)
    try:
        try:
            work = COMMANDS[name].load()(argv)
        except (ValueError, OSError, ImportError) as error:  # while setting up: what was asked for can't be
            return _say(name, one_line(error), 2 if isinstance(error, UsageError) else 1)
        return work() or 0
    except refused as error:
        return _say(name, one_line(error), 1)
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _say(name, one_line(error), 1)


def _is_ours(error: BaseException) -> bool:
    """Return whether this package raised the error itself, and so wrote its message for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("trl_tafs.")


def _say(name: str, message: str, code: int) -> int:
    print(f"trl-tafs {name}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
