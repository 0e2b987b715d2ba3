"""The `trl-tafs` command: one function a subcommand, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from trl_tafs.cli.evaluate import evaluate
from trl_tafs.cli.sample import sample
from trl_tafs.cli.serve import serve_reward
from trl_tafs.cli.train import train


def env(argv: Sequence[str]) -> Callable[[], None]:
    """Print versions and devices, to paste into an issue."""
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


COMMANDS = {"train": train, "sample": sample, "evaluate": evaluate, "serve-reward": serve_reward, "env": env}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        print("usage: trl-tafs {" + ",".join(COMMANDS) + "} [options]; trl-tafs COMMAND --help")
        for name, command in COMMANDS.items():
            print(f"  {name:13} {(command.__doc__ or '').splitlines()[0]}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from trl_tafs.hub.push import PushError
    from trl_tafs.rewards.scoring import RewardError
    from trl_tafs.training.checkpoint_files import CheckpointError
    from trl_tafs.training.run_folder import RunFolderError

    refused: tuple[type[Exception], ...] = (RewardError, CheckpointError, PushError, RunFolderError)
    try:
        try:
            work = COMMANDS[argv[0]](argv[1:])
        except (ValueError, OSError) as error:  # while setting up: what was asked for can't be
            print(f"trl-tafs {argv[0]}: {error}", file=sys.stderr)
            return 1
        work()  # errors that aren't ours are shown whole
    except refused as error:
        print(f"trl-tafs {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell counts it
    return 0


if __name__ == "__main__":
    sys.exit(main())
