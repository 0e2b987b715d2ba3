"""The `trl-tafs` command: one function a subcommand, errors in one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from trl_tafs.cli.doctor import doctor
from trl_tafs.cli.evaluate import evaluate
from trl_tafs.cli.parsing import OneLineParser, UsageError
from trl_tafs.cli.plan import plan
from trl_tafs.cli.sample import sample
from trl_tafs.cli.serve import serve_reward
from trl_tafs.cli.train import train
from trl_tafs.output.errors import did_you_mean, one_line, shown


def env(argv: Sequence[str]) -> Callable[[], None]:
    """Print versions and devices, to paste into an issue."""
    OneLineParser(prog="trl-tafs env", description=env.__doc__).parse_args(list(argv))
    return _env


def _env() -> None:
    import platform

    import torch

    from trl_tafs.hub.facts import library_versions

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, version in library_versions().items():
        print(f"{name} {version}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) if devices else 'CPU only'}")


COMMANDS: dict[str, Callable[[Sequence[str]], Callable[[], int | None]]] = {
    "train": train,
    "plan": plan,
    "doctor": doctor,
    "sample": sample,
    "evaluate": evaluate,
    "serve-reward": serve_reward,
    "env": env,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 for what can't be, 2 for what isn't understood, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        return _usage(argv)
    try:
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        return _say(argv[0], "interrupted", 130)
    except SystemExit as end:  # argparse's, after --help; a server's
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _usage(argv: Sequence[str]) -> int:
    asked = bool(argv) and argv[0] in ("-h", "--help")
    if argv and not asked:
        print(f"trl-tafs: there is no command {shown(argv[0])}{did_you_mean(argv[0], COMMANDS)}", file=sys.stderr)
    print("usage: trl-tafs {" + ",".join(COMMANDS) + "} [options]; trl-tafs COMMAND --help")
    for name, command in COMMANDS.items():
        print(f"  {name:13} {(command.__doc__ or '').splitlines()[0]}")
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
            work = COMMANDS[name](argv)
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
