"""`trl-tafs push`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from trl_tafs.cli.adapters import check_adapter
from trl_tafs.cli.command import CommandOptions, parse
from trl_tafs.cli.parsing import UsageError


@dataclass
class PushOptions(CommandOptions):
    """What is pushed, and where."""

    title: ClassVar[str] = "Push"
    positional: ClassVar[dict[str, str | None]] = {"adapter": None, "repository": None}

    adapter: str = field(default="", metadata={"help": "The folder that training wrote, such as logs/RUN/adapter."})
    repository: str = field(default="", metadata={"help": "user/name, or name for your own; made if missing."})
    private: bool | None = field(default=None, metadata={"help": "Of a repository that is made; None: your default."})
    revision: str | None = field(default=None, metadata={"help": "A branch instead of main, made if missing."})
    commit_message: str | None = field(default=None, metadata={"help": "Of the commit."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})


def push(argv: Sequence[str]) -> Callable[[], None]:
    """Push an adapter's folder to the Hub: weights, scheduler, card and pictures, nothing else that lies there."""
    from trl_tafs.hub.names import check_repo_id
    from trl_tafs.hub.push import push_folder

    usage = "%(prog)s ADAPTER USER/NAME [options]"
    (options,) = parse([PushOptions], argv, prog="trl-tafs push", description=push.__doc__, usage=usage)
    if not Path(options.adapter).is_dir():
        raise UsageError(f"there is no folder {options.adapter!r}; give the one that training wrote")
    check_adapter(options.adapter)
    check_repo_id(options.repository, "the repository")
    given = {name: getattr(options, name) for name in ("private", "revision", "commit_message", "create_pr")}
    return lambda: print(push_folder(options.adapter, options.repository, **given))
