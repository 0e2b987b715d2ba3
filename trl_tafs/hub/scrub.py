"""What may not be published: secrets, paths, names of people and machines, taken out of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import getpass
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_tafs.output.secrets import REMOVED, SHORTEST, WORDS, assigned, hide, private_key, snake

# Words that make a key private, beside those of secrets: the key is left out, and what is assigned to it in text.
_PRIVATE = rf"(?:{WORDS}|user(?:_?name)?|entity|e?mail|host(?:_?name)?)"
_PRIVATE_KEY, _ASSIGNED = private_key(_PRIVATE), assigned(_PRIVATE)
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.]+")
_HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # a W&B key, or the hash of a commit
# The user in a path of a home directory: `/home/NAME`, `/Users/NAME`, `\Users\NAME`, `~NAME`.
_HOME = re.compile(r"(?:/home/|/Users/|\\Users\\|~)([\w.-]+)")
# A value that is an absolute path as a whole, spaces included: `/a b/c`, `~/c`, `C:\c`, `\\server\c`, `file:...`.
_PATH_ALONE = re.compile(r"(?:file:|~|/|\\\\|[A-Za-z]:[\\/])\S*.*", re.DOTALL)
# An absolute path within a text, up to a space or a bracket; not the path of an address (`https://host/path`).
_PATH = re.compile(
    r"(?:file:/*|(?<![\w/.:~\\])[A-Za-z]:(?=\\)|(?<!\w)~\w*|(?<![\w/.~\\]))[/\\](?!/)[^\s'\",;()\[\]{}<>|]+"
)
# Names of users and machines that tell nobody apart.
_NOBODY = {"root", "user", "users", "home", "admin", "ubuntu", "nobody", "localhost", "runner"}


def scrub(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they may be published: JSON values without secrets, absolute paths, user and host names.

    Keys that name secrets or people are dropped. In strings, at any depth, secrets (also those in
    environment variables of such names), this machine's name, its user and those of any home directory become
    "[removed]", and a path becomes its last component.
    """
    plain = _plain(settings)
    names = {*_HOME.findall(json.dumps(plain).replace("\\\\", "\\")), *_identities()}
    names = {name for name in names if len(name) > 2 and name.lower() not in _NOBODY}
    people = [rf"(?<![^\W_]){re.escape(name)}(?![^\W_])" for name in sorted(names, key=len, reverse=True)]
    people += [re.escape(v) for k, v in os.environ.items() if len(v) >= SHORTEST and _PRIVATE_KEY.search(k.lower())]
    return _scrubbed(plain, "", re.compile("|".join(people) or r"(?!)", re.IGNORECASE))


def _identities() -> set[str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need have no name
        user = ""
    return {user, Path.home().name, socket.gethostname(), socket.gethostname().split(".")[0]}


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it; an object that JSON has no form for becomes its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, str) and value.startswith(("{", "[")):  # trackers store nested settings as JSON
        with contextlib.suppress(ValueError):
            return _plain(json.loads(value))
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    text = str(value)
    return type(value).__name__ if " object at 0x" in text else text


def _scrubbed(value: Any, key: str, people: re.Pattern) -> Any:
    if isinstance(value, dict):
        return {
            _scrubbed(name, "", people): _scrubbed(item, name, people)
            for name, item in value.items()
            if not _PRIVATE_KEY.search(snake(name))
        }
    if isinstance(value, list):
        return [_scrubbed(item, key, people) for item in value]
    if not isinstance(value, str):
        return value
    value = _MAIL.sub(REMOVED, _ASSIGNED.sub(REMOVED, hide(value)))
    if not key.endswith(("revision", "commit", "sha")):
        value = _HEX_KEY.sub(REMOVED, value)
    if _PATH_ALONE.fullmatch(value):
        value = _last_component(value)
    return people.sub(REMOVED, _PATH.sub(lambda path: _last_component(path[0]), value))


def _last_component(path: str) -> str:
    name = re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
    return REMOVED if name.startswith("~") or not name else name
