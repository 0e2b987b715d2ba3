"""`trl-tafs serve-reward`: one reward behind HTTP, for trainers in other processes and on other machines."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from trl_tafs.rewards.scoring import RewardError, RewardFunction, RewardRefused, RewardSet
from trl_tafs.rewards.wire import SECRET, decode_images, encode_rewards

MAX_BYTES = 256 * 2**20
MAX_IMAGES = 256


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def check_exposure(host: str, secret: str | None) -> None:
    """An error where others could reach the server and nothing would keep them out."""
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
) -> Any:
    """The ASGI application: `GET /health`, and `POST /score` with images, prompts and metadata.

    Args:
        name: of the reward, told by `/health`.
        reward: any reward; it is called by one request at a time.
        secret: what `Authorization: Bearer` must carry; None: everyone may ask.
        max_bytes: of a request.
        max_images: of a request.
        max_waiting: requests at once; more are told to come back (503).
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    rewards, turn, waiting = RewardSet({name: reward}), threading.Lock(), threading.Semaphore(max_waiting)

    def refuse(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"error": reason}, status_code=status)

    def compute(message: Mapping[str, Any]) -> list[float | None]:
        images = decode_images(message)
        prompts, metadata = check_texts(message, len(images))
        with turn:
            return encode_rewards(rewards(images, prompts, metadata).values[:, 0])

    async def health(request: Request) -> JSONResponse:
        if not authorized(request, secret):
            return refuse(401, "the secret is missing or wrong")
        return JSONResponse({"name": name, "max_images": max_images, "max_bytes": max_bytes})

    async def score(request: Request) -> JSONResponse:
        if not authorized(request, secret):
            return refuse(401, "the secret is missing or wrong")
        if not waiting.acquire(blocking=False):
            return refuse(503, f"{max_waiting} requests are waiting already")
        try:
            body = await read_body(request, max_bytes)
            if body is None:
                return refuse(413, f"a request may have {max_bytes} bytes; send fewer images at once")
            try:
                message = json.loads(body)
                if len(message["images"]) > max_images:
                    return refuse(413, f"a request may have {max_images} images, got {len(message['images'])}")
                return JSONResponse({"rewards": await run_in_threadpool(compute, message)})
            except (ValueError, KeyError, TypeError) as error:  # the request isn't what it should be
                return refuse(400, f"{type(error).__name__}: {error}")
            except RewardError as error:
                return refuse(400 if isinstance(error, RewardRefused) else 500, str(error))
        finally:
            waiting.release()

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


def authorized(request: Any, secret: str | None) -> bool:
    """Whether the request carries the secret, where there is one; compared in constant time."""
    given = request.headers.get("authorization", "")
    return secret is None or hmac.compare_digest(given.encode(), f"Bearer {secret}".encode())


async def read_body(request: Any, limit: int) -> bytes | None:
    """The body of a request, None as soon as it is longer than `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def check_texts(message: Mapping[str, Any], number: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts and metadata of a request, one each an image."""
    prompts, metadata = message.get("prompts"), message.get("metadata") or [{}] * number
    for name, values, kind in (("prompts", prompts, str), ("metadata", metadata, dict)):
        if not (isinstance(values, list) and len(values) == number and all(isinstance(v, kind) for v in values)):
            raise ValueError(f"a request of {number} images needs as many {name}, {kind.__name__} each")
    return prompts, metadata


def serve(name: str, reward: RewardFunction, host: str = "127.0.0.1", port: int = 8000, **limits: Any) -> None:
    """Answer until interrupted; the secret is read from the environment."""
    import uvicorn

    secret = os.environ.get(SECRET)
    check_exposure(host, secret)
    app = make_app(name, reward, secret=secret, **limits)
    print(f"reward {name} at http://{host}:{port}" + (", with a secret" if secret else ""), flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
