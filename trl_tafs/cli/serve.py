"""`trl-tafs serve-reward`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from trl_tafs.cli.parsing import OneLineParser, UsageError, check_numbers
from trl_tafs.output.errors import require


def serve_reward(argv: Sequence[str]) -> Callable[[], None]:
    """Serve a reward over HTTP, for trainers in other processes and on other machines."""
    from trl_tafs.options import decode_dict
    from trl_tafs.rewards.loading import load_reward, reward_label
    from trl_tafs.rewards.server import SECRET, check_exposure, serve

    options = serving_parser().parse_args(list(argv))
    check_numbers(options, port=0, max_bytes=1, max_images=1)
    if options.port > 65535:
        raise UsageError(f"--port is {options.port}; it must be at most 65535")
    check_exposure(options.host, os.environ.get(SECRET))
    given = decode_dict("--options", options.options)
    for package in ("uvicorn", "starlette"):
        require(package, "serve-reward", "server")
    reward = load_reward(options.name, given)
    limits = {"max_bytes": options.max_bytes, "max_images": options.max_images}
    return partial(serve, reward_label(options.name), reward, options.host, options.port, **limits)


def serving_parser() -> OneLineParser:
    """Return the parser of `trl-tafs serve-reward`."""
    from trl_tafs.rewards.server import MAX_BYTES, MAX_IMAGES, SECRET

    parser = OneLineParser(prog="trl-tafs serve-reward", description=serve_reward.__doc__)
    parser.add_argument("name", help="a name of trl_tafs.rewards.REWARDS, module:name or file.py:name")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help=f"any other than loopback needs {SECRET} set")
    parser.add_argument("--options", default="{}", help="of the reward, as JSON")
    parser.add_argument("--max_bytes", type=int, default=MAX_BYTES, help="of one request")
    parser.add_argument("--max_images", type=int, default=MAX_IMAGES, help="of one request")
    return parser
