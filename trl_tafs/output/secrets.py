"""Secrets, kept out of all that is written, sent or printed.

Two kinds are known: what has the form of a secret (tokens of the Hub and others, bearer headers, the user and password
of an address, what is assigned to a name such as `api_key`), and what was given as one: `remember` it, and `hide` finds
it in any text from then on, also in a stranger's answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

REMOVED = "[removed]"
SHORTEST = 8  # characters of a secret that is found by itself; a shorter one may be any word
# Words that make a key's value a secret.
WORDS = r"(?:token|secret|passw(?:or)?d|passphrase|credentials?|(?:api|access|private|secret)_?key|auth\w*)"
USERINFO = re.compile(r"(?<=://)[^\s/?#,]*@")
# By their form: tokens of the Hub, GitHub, OpenAI, AWS and W&B, JSON web tokens, bearer headers.
_FORMS = re.compile(
    r"\b(?:hf|api_org)_\w{8,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}|\bsk-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bwandb_v\d_\w+|\beyJ[\w-]+\.[\w-]+\.[\w-]+|(?i:\bbearer) \S+"
)
_remembered: set[str] = set()


def private_key(words: str = WORDS) -> re.Pattern[str]:
    """Return what finds a key that has one of the words as a part: `hub_token`, `wandb_api_key`, not `tokens`."""
    return re.compile(rf"(?:^|_){words}(?:$|_)")


def assigned(words: str = WORDS) -> re.Pattern[str]:
    """Return what finds `token=...`, `"password": ...`, `--hub_token ...` in text."""
    return re.compile(rf"(?:(?<![^\W_]){words}['\"]?\s*[:=]|--[\w-]*{words}[ =])\s*['\"]?[^\s'\",;]+", re.IGNORECASE)


_KEY, _ASSIGNED = private_key(), assigned()


def snake(name: str) -> str:
    """Return a key as `private_key` has it: `apiKey` and `api-key` as `api_key`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_").lower()


def remember(value: Any) -> None:
    """Hide this text from now on, wherever it is; a short one, or what isn't text, is let be."""
    if isinstance(value, str) and len(value) >= SHORTEST:
        _remembered.update({value, quote(value, safe=""), repr(value)[1:-1]})


def remember_all(settings: Any, *, secret: bool = False) -> None:
    """Remember every secret in nested settings: all text below a key that names one."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            remember_all(value, secret=secret or bool(_KEY.search(snake(str(key)))))
    elif isinstance(settings, (list, tuple)):
        for item in settings:
            remember_all(item, secret=secret)
    elif secret:
        remember(settings)


def hide(text: str) -> str:
    """Return the text with each secret as "[removed]", and without the user and password of any address."""
    environment = {v for k, v in os.environ.items() if len(v) >= SHORTEST and _KEY.search(k.lower())}
    for secret in sorted(_remembered | environment, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    return _ASSIGNED.sub(REMOVED, _FORMS.sub(REMOVED, without_userinfo(text)))


def without_userinfo(text: str) -> str:
    """Return the text with the user and password of every URL in it left out."""
    return USERINFO.sub("", text)


def without_secrets(value: Any) -> Any:
    """Return settings with "[removed]" for each secret: below a key that names one, or within any text.

    Mappings, lists and tuples are copied; what is none of these and no text is returned as it is.
    """
    if isinstance(value, Mapping):
        return {hide(key) if isinstance(key, str) else key: _value_of(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item) for item in value) if type(value) in (list, tuple) else value
    return hide(value) if isinstance(value, str) else value


def _value_of(key: Any, value: Any) -> Any:
    private = bool(_KEY.search(snake(str(key)))) and value not in (None, "", True, False)
    return REMOVED if private else without_secrets(value)
