"""`trl-tafs serve-reward`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial


def serve_reward(argv: Sequence[str]) -> Callable[[], None]:
    """Serve a reward over HTTP, for trainers in other processes and on other machines."""
    from trl_tafs.options import decode_dict
    from trl_tafs.rewards.loading import load_reward, reward_label
    from trl_tafs.rewards.server import SECRET, check_exposure, serve

    options = serving_parser().parse_args(list(argv))
    check_exposure(options.host, os.environ.get(SECRET))
    reward = load_reward(options.name, decode_dict("--options", options.options))
    limits = {"max_bytes": options.max_bytes, "max_images": options.max_images}
    return partial(serve, reward_label(options.name), reward, options.host, options.port, **limits)


def serving_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-tafs serve-reward`."""
    from trl_tafs.rewards.server import MAX_BYTES, MAX_IMAGES, SECRET

    parser = argparse.ArgumentParser(prog="trl-tafs serve-reward", description=serve_reward.__doc__)
    parser.add_argument("name", help="a name of trl_tafs.rewards.REWARDS, module:name or file.py:name")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help=f"any other than loopback needs {SECRET} set")
    parser.add_argument("--options", default="{}", help="of the reward, as JSON")
    parser.add_argument("--max_bytes", type=int, default=MAX_BYTES, help="of one request")
    parser.add_argument("--max_images", type=int, default=MAX_IMAGES, help="of one request")
    return parser
