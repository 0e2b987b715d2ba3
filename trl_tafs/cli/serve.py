"""`trl-tafs serve-reward`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from trl_tafs.cli.command import CommandOptions, make_parser, parse
from trl_tafs.cli.parsing import UsageError, check_numbers
from trl_tafs.output.errors import require
from trl_tafs.rewards.server import MAX_BYTES, MAX_IMAGES, SECRET, check_exposure, serve


@dataclass
class ServeOptions(CommandOptions):
    """Which reward is served, and where."""

    title: ClassVar[str] = "Serving"
    positional: ClassVar[dict[str, str | None]] = {"name": None}

    name: str = field(default="", metadata={"help": "A name of trl_tafs.rewards.REWARDS, module:name or file.py:name."})
    port: int = field(default=8000, metadata={"help": "Port."})
    host: str = field(default="127.0.0.1", metadata={"help": "Any other than loopback needs " + SECRET + " set."})
    options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Of the reward, as JSON."})
    max_bytes: int = field(default=MAX_BYTES, metadata={"help": "Of one request."})
    max_images: int = field(default=MAX_IMAGES, metadata={"help": "Of one request."})


def serve_reward(argv: Sequence[str]) -> Callable[[], None]:
    """Serve a reward over HTTP, for trainers in other processes and on other machines."""
    from trl_tafs.rewards.loading import load_reward, reward_label

    (options,) = parse([ServeOptions], argv, parser=serving_parser())
    check_numbers(options, port=0, max_bytes=1, max_images=1)
    if options.port > 65535:
        raise UsageError(f"--port is {options.port}; it must be at most 65535")
    check_exposure(options.host, os.environ.get(SECRET))
    for package in ("uvicorn", "starlette"):
        require(package, "serve-reward", "server")
    reward = load_reward(options.name, options.options)
    limits = {"max_bytes": options.max_bytes, "max_images": options.max_images}
    return partial(serve, reward_label(options.name), reward, options.host, options.port, **limits)


def serving_parser() -> Any:
    """Return the parser of `trl-tafs serve-reward`."""
    usage = "%(prog)s NAME [options]"
    return make_parser([ServeOptions], prog="trl-tafs serve-reward", description=serve_reward.__doc__, usage=usage)
