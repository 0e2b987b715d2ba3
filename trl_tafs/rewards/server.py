"""`trl-tafs serve-reward`: one reward behind HTTP, for trainers in other processes and on other machines."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trl_tafs.output.errors import require
from trl_tafs.rewards.scoring import RewardError, RewardFunction, RewardRefused, RewardSet
from trl_tafs.rewards.web import printable, read_json
from trl_tafs.rewards.wire import SECRET, decode_images, decode_metadata, encode_rewards

MAX_BYTES = 256 * 2**20  # of a request
MAX_IMAGES = 256  # of a request
MAX_VALUES = 1_000_000  # of a request's JSON
MAX_CONNECTIONS = 256
BODY_SECONDS = 60.0  # for receiving a request


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def check_exposure(host: str, secret: str | None) -> None:
    """Raise ValueError if others could reach the server and nothing would keep them out."""
    if not is_loopback(host) and not secret:
        raise ValueError(f"--host {host} can be reached from other machines; set {SECRET} on both sides first")


def make_app(
    name: str,
    reward: RewardFunction,
    *,
    secret: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_images: int = MAX_IMAGES,
    max_waiting: int = 16,
    body_seconds: float = BODY_SECONDS,
) -> Any:
    """Return the ASGI application: `GET /health`, and `POST /score` with images, prompts and metadata.

    A request that isn't as it should be is answered by 400, 401, 408, 413 or 415, and one too many by 503.

    Args:
        name: of the reward, told by `/health`.
        reward: any reward; it is called by one request at a time.
        secret: what `Authorization: Bearer` must carry; None: everyone may ask.
        max_bytes: of a request; all that are being received may have twice as many together.
        max_images: of a request.
        max_waiting: whole requests at once; more are told to come back (503).
        body_seconds: a request's body must have come by then.
    """
    require("starlette", "serve-reward", "server")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    intake, waiting = Intake(max_bytes, body_seconds), threading.Semaphore(max_waiting)
    scorer = Scorer(RewardSet({name: reward}), max_images)

    async def health(request: Request) -> JSONResponse:
        if not authorized(request, secret):
            return JSONResponse({"error": "the secret is missing or wrong"}, 401)
        return JSONResponse({"name": name, "max_images": max_images, "max_bytes": max_bytes})

    async def score(request: Request) -> JSONResponse:
        taken = 0
        try:
            if not authorized(request, secret):
                raise Refusal(401, "the secret is missing or wrong")
            check_headers(request, max_bytes)
            body = await intake.read(request)
            taken = len(body)
            if not waiting.acquire(blocking=False):
                raise Refusal(503, f"{max_waiting} requests are waiting already")
            try:
                return JSONResponse({"rewards": await run_in_threadpool(scorer, body)})
            finally:
                waiting.release()
        except Refusal as refusal:
            reason = printable(refusal.reason.encode("utf-8", "replace").decode())
            return JSONResponse({"error": reason}, refusal.status)
        finally:
            intake.release(taken)

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


class Refusal(Exception):
    """A request that isn't answered by scores."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Intake:
    """Receives requests' bodies, within bounds of size, of time, and of all that are there at once.

    A connection that sends nothing holds nothing: it keeps no other from being answered.
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds, self.held = max_bytes, seconds, 0

    async def read(self, request: Any) -> bytes:
        """Return the body, to be released by its length, or raise Refusal: 408 too slow, 413 too long, 503 too many."""
        from starlette.requests import ClientDisconnect

        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    body += chunk
                    self.held += len(chunk)
                    if len(body) > self.max_bytes:
                        raise too_long(self.max_bytes)
                    if self.held > 2 * self.max_bytes:
                        raise Refusal(503, f"requests of {2 * self.max_bytes} bytes are waiting already")
            return bytes(body)
        except BaseException as error:
            self.release(len(body))
            if isinstance(error, TimeoutError):
                raise Refusal(408, f"a request must be sent in {self.seconds:g} s") from error
            if isinstance(error, ClientDisconnect):
                raise Refusal(400, "the connection was closed") from error
            raise

    def release(self, size: int) -> None:
        """Give back the bytes of a body."""
        self.held -= size


class Scorer:
    """Scores a request's body, called in threads: one request is scored while the next is decoded."""

    def __init__(self, rewards: RewardSet, max_images: int) -> None:
        self.rewards, self.max_images = rewards, max_images
        self.decoding, self.turn = threading.Semaphore(2), threading.Lock()

    def __call__(self, body: bytes) -> list[float | None]:
        """Return a score an image, None for no score, or raise Refusal."""
        with self.decoding:
            try:
                images, prompts, metadata = self.decode(body)
                with self.turn:
                    return encode_rewards(self.rewards(images, prompts, metadata).values[:, 0])
            except ValueError as error:
                raise Refusal(400, str(error)) from error
            except RewardError as error:
                raise Refusal(400 if isinstance(error, RewardRefused) else 500, str(error)) from error

    def decode(self, body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
        """Return images, prompts and metadata of a request; raise ValueError or Refusal if they aren't such."""
        if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:  # each costs many times its bytes
            raise Refusal(413, f"a request may have {MAX_VALUES} values of JSON")
        message = read_json(body, nan=True)  # metadata may have NaN
        if not isinstance(message, dict):
            raise ValueError(f"a request is a JSON object, not a {type(message).__name__}")
        texts = message.get("images")
        if isinstance(texts, list) and len(texts) > self.max_images:
            raise Refusal(413, f"a request may have {self.max_images} images, got {len(texts)}")
        images = decode_images(message)
        return images, *check_texts(message, len(images))


def too_long(limit: int) -> Refusal:
    """Return the answer to a request that is too long."""
    return Refusal(413, f"a request may have {limit} bytes; send fewer images at once")


def check_headers(request: Any, max_bytes: int) -> None:
    """Raise Refusal for a body that would not be read: too long by its own word, compressed, or no JSON."""
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise too_long(max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "a request must be of content type application/json, without compression")


def authorized(request: Any, secret: str | None) -> bool:
    """Return whether the request carries the secret, where there is one; compared in constant time."""
    given = request.headers.get("authorization", "")
    return secret is None or hmac.compare_digest(given.encode(), f"Bearer {secret}".encode())


def check_texts(message: Mapping[str, Any], number: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the prompts and metadata of a request, one each an image."""
    prompts, metadata = message.get("prompts"), message.get("metadata") or [{}] * number
    for name, values, kind in (("prompts", prompts, str), ("metadata", metadata, dict)):
        if not (isinstance(values, list) and len(values) == number and all(isinstance(v, kind) for v in values)):
            raise ValueError(f"a request of {number} images needs as many {name}, {kind.__name__} each")
    for prompt in prompts:
        prompt.encode()  # raises for half a surrogate pair, which no tokenizer takes
    return prompts, decode_metadata(metadata)


def connection_bounds(receive_seconds: float = BODY_SECONDS) -> dict[str, Any]:
    """Return uvicorn's options for connections: `MAX_CONNECTIONS` at once, of one request each.

    A connection whose request's headers haven't come after `receive_seconds` is closed.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.patience = self.loop.call_later(receive_seconds, self.close_if_silent)

        def connection_lost(self, exc: Exception | None) -> None:
            self.patience.cancel()
            super().connection_lost(exc)

        def close_if_silent(self) -> None:
            if self.cycle is None:
                self.transport.abort()

    headers = [("connection", "close")]
    return {"http": BoundedProtocol, "ws": "none", "headers": headers, "limit_concurrency": MAX_CONNECTIONS}


def serve(name: str, reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, **limits: Any) -> None:
    """Answer until interrupted; the secret is read from the environment."""
    uvicorn = require("uvicorn", "serve-reward", "server")
    secret = os.environ.get(SECRET)
    check_exposure(host, secret)
    app = make_app(name, reward, secret=secret, **limits)
    print(f"reward {name} at http://{host}:{port}" + (", with a secret" if secret else ""), flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", **connection_bounds())
