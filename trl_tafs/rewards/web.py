"""The one HTTP client: a deadline for a whole call, a bound on what is read, no redirects, no passwords in messages."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from trl_tafs.output.secrets import hide, remember

MAX_ANSWER = 2**20  # bytes of an answer, unless the caller says otherwise
MAX_DEPTH = 32  # of JSON


class WebError(Exception):
    """A call without an answer: no connection, too slow, too long, or a redirect. The message has no password."""


@dataclass(frozen=True)
class Address:
    """Where a server is. What is shown is `label`; the user and password of the URL are only sent."""

    url: str  # scheme://host:port/path
    label: str  # host:port
    user: tuple[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answer:
    """What a server sent."""

    label: str  # host:port of the server
    status: int
    body: bytes
    retry_after: float | None = None  # seconds that the server asks to wait before another try

    def text(self, length: int = 300) -> str:
        """Return the body's beginning, fit for a message, without what was sent as a secret."""
        return printable(hide(self.body[: 4 * length].decode("utf-8", "replace")), length)

    def json_object(self) -> dict[str, Any]:
        """Return the JSON object that the body is, or raise WebError."""
        try:
            value = read_json(self.body)
        except ValueError as error:
            told = printable(hide(str(error)), 100)
            raise WebError(f"{self.label} answered what is no JSON ({told}): {self.text(100)!r}") from error
        if not isinstance(value, dict):
            raise WebError(f"{self.label} answered a {type(value).__name__}, not an object")
        return value


def printable(text: str, length: int = 300) -> str:
    """Return a stranger's text for a message: one line, without control characters, cut after `length` characters."""
    return "".join(c if c.isprintable() else " " for c in text[:length])


def parse_address(text: str) -> Address:
    """Return the parts of `http://user:password@host:port/path`, without quoting any of it in an error.

    Raises:
        ValueError: it is no address of http or https, or has a query or a fragment.
    """
    wrong = (
        "an address must be http://host:port or https://host:port, a path may follow, and a user's name and password"
    )
    wrong += " may stand before the host, special characters in them as %XX"
    try:
        parts = urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        raise ValueError(wrong) from None  # the error would quote the address
    label = parts.netloc.rpartition("@")[2]
    if not valid or parts.query or parts.fragment or "@" in parts.path or not re.fullmatch(r"[\w.:\[\]%-]+", label):
        raise ValueError(wrong)
    user = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    remember(user and user[1])
    return Address(f"{parts.scheme}://{label}{parts.path.rstrip('/')}", label, user)


def fetch(
    address: Address,
    path: str = "",
    *,
    body: bytes | None = None,
    token: str | None = None,
    deadline: float,
    max_bytes: int = MAX_ANSWER,
) -> Answer:
    """GET, or with a JSON body POST, `path` below the address.

    Args:
        address: of the server; its user and password go before the token.
        path: below the address, with its slash.
        body: JSON to post.
        token: sent as `Authorization: Bearer`.
        deadline: seconds for all of it: connect, send, and read to the last byte.
        max_bytes: of the answer; reading stops there.

    Raises:
        WebError: there is no answer of that size in that time, or it is a redirect, which isn't followed.
    """
    remember(token)

    def run() -> Answer:
        return asyncio.run(_fetch(address, path, body, token, deadline, max_bytes))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with ThreadPoolExecutor(1) as executor:  # a notebook's loop is running in this thread
        return executor.submit(run).result()


async def _fetch(
    address: Address, path: str, body: bytes | None, token: str | None, deadline: float, max_bytes: int
) -> Answer:
    import httpx2

    headers = {"Accept-Encoding": "identity"}  # a compressed answer's size can't be told while it is read
    if body is not None:
        headers["Content-Type"] = "application/json"
    if token and address.user is None:
        headers["Authorization"] = f"Bearer {token}"
    method = "GET" if body is None else "POST"
    try:
        async with asyncio.timeout(deadline):
            async with (
                httpx2.AsyncClient(verify=_tls(), timeout=None, follow_redirects=False) as client,
                client.stream(method, address.url + path, content=body, headers=headers, auth=address.user) as response,
            ):
                _check_head(address, response)
                body, wait = await _read(address, response, max_bytes), seconds_of(response.headers.get("retry-after"))
                return Answer(address.label, response.status_code, body, wait)
    except TimeoutError as error:
        raise WebError(f"{address.label}: the call timed out after {deadline:g} s") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ImportError, ValueError, OSError) as error:
        told = printable(hide(str(error))) or "no answer"
        raise WebError(f"{address.label}: {type(error).__name__}: {told}") from error


def _check_head(address: Address, response: Any) -> None:
    """Raise WebError if the answer is a redirect or compressed."""
    if 300 <= response.status_code < 400:
        target = printable(hide(response.headers.get("location", "nowhere")))
        raise WebError(
            f"{address.label} answered {response.status_code}, a redirect to {target}; redirects aren't followed: give "
            "the address that answers"
        )
    if response.headers.get("content-encoding", "identity") != "identity":
        raise WebError(f"{address.label} sent a compressed answer, and none was asked for")


def seconds_of(retry_after: str | None) -> float | None:
    """Return the seconds from now that a Retry-After header names, as a number or a date; None where it names none."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def pause(back_off: float, retry_after: float | None, limit: float) -> float:
    """Return the seconds to wait before another try: what the server asked for up to `limit`, or a longer back-off."""
    return max(back_off, min(retry_after or 0.0, limit))


async def _read(address: Address, response: Any, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise WebError(f"{address.label} sent more than {max_bytes} bytes; no more are read")
    return bytes(body)


@functools.cache
def _tls() -> Any:
    """The certificates that are trusted, read once."""
    import httpx2

    return httpx2.create_ssl_context()


def read_json(data: bytes, *, nan: bool = False, max_depth: int = MAX_DEPTH) -> Any:
    """Return what JSON bytes hold; NaN and Infinity, which are no JSON, only where `nan` allows them.

    Raises:
        ValueError: they aren't JSON, or nested more than `max_depth` deep.
    """
    try:
        value = json.loads(data) if nan else json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"JSON that is nested more than {max_depth} deep") from None
    level = [value]
    for _ in range(max_depth + 1):
        level = [item for one in level if isinstance(one, (list, Mapping)) for item in _items(one)]
        if not level:
            return value
    raise ValueError(f"JSON that is nested more than {max_depth} deep")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, Mapping) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
