"""A reward in another process or on another machine, served by `trl-tafs serve-reward`."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.scoring import RewardError, RewardRefused, as_rewards
from trl_tafs.rewards.web import Address, WebError, fetch, parse_address, pause
from trl_tafs.rewards.wire import FORMATS, SECRET, encode_images, encode_metadata

REFUSED = (400, 401, 403, 413, 415)  # answers that asking again doesn't change
HEALTH_SECONDS = 10.0
MAX_NAME = 100  # characters of a served reward's name


class RequestRefused(RewardRefused):
    """The server won't take the request: neither another try nor another endpoint helps."""


class EndpointFailed(RewardError):
    """An endpoint gave no scores; another try may help, after `retry_after` seconds where it says so."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RemoteReward:
    """The served reward's scores. Several endpoints share the work, and stand in for each other.

    When it is made, every endpoint is asked for its health: one must answer. An answer may have `web.MAX_ANSWER` bytes,
    and redirects aren't followed. A user and password in an address authenticate, and are shown nowhere.

    Args:
        endpoints: `http://host:port`, one or several.
        format: "png", rounded to 8 bits; "raw", float32 as it is, several times as large.
        batch_size: images of one request.
        timeout: seconds for one request, from connecting to the answer's last byte.
        max_retries: rounds over the endpoints after the first.
        retry_delay: seconds before the second round, doubled each time; longer, up to `timeout`, where every endpoint
            asks for it by Retry-After.
        on_failure: what becomes of images that no endpoint scored: "error", or "mask", no score (NaN).
        secret: for servers that ask for one; by default from the environment's TRL_TAFS_REWARD_SECRET.
    """

    runs_in_threads = True

    def __init__(
        self,
        endpoints: str | Sequence[str],
        format: str = "png",
        batch_size: int = 16,
        timeout: float = 60.0,
        max_retries: int = 2,
        retry_delay: float = 1.0,
        on_failure: str = "error",
        secret: str | None = None,
    ) -> None:
        if format not in FORMATS or on_failure not in ("error", "mask"):
            raise ValueError(
                f"remote: format {format!r} (png, raw) or on_failure {on_failure!r} (error, mask) is unknown"
            )
        if batch_size < 1 or not 0 < timeout < float("inf") or max_retries < 0:
            raise ValueError(
                f"remote: batch_size {batch_size}, timeout {timeout}, max_retries {max_retries} can't work"
            )
        self.addresses = [parse_address(url) for url in ([endpoints] if isinstance(endpoints, str) else endpoints)]
        if not self.addresses:
            raise ValueError("remote needs at least one endpoint, http://host:port")
        if secret and any(address.user for address in self.addresses):
            raise ValueError("remote: a request carries either the address's user and password or the secret; give one")
        self.format, self.batch_size, self.timeout, self.on_failure = format, batch_size, timeout, on_failure
        self.max_retries, self.retry_delay = max_retries, retry_delay
        self.secret = secret or os.environ.get(SECRET)
        with ThreadPoolExecutor(len(self.addresses)) as executor:
            self.__name__ = self.check_health(executor)

    def check_health(self, executor: ThreadPoolExecutor) -> str:
        """Ask all endpoints, and return the name of what they serve.

        Raises:
            ValueError: none answers, one refuses the secret, or they serve different rewards.
        """
        told = list(zip(self.addresses, executor.map(self._health, self.addresses), strict=True))
        faults = {address.label: answer for address, answer in told if isinstance(answer, Exception)}
        names = {address.label: answer for address, answer in told if isinstance(answer, str)}
        if not names:
            shown = "; ".join(str(error) for error in faults.values())
            raise ValueError(f"no reward server answers ({shown}); start one by trl-tafs serve-reward, or set {SECRET}")
        if len(set(names.values())) > 1:
            raise ValueError(f"the endpoints serve different rewards: {names}; make a remote reward of each")
        for label, error in faults.items():
            warnings.warn(f"reward server {label} doesn't answer ({error}); the others do its work", stacklevel=4)
        return next(iter(names.values()))

    def _health(self, address: Address) -> str | Exception:
        """Return what an endpoint serves, or why that isn't known."""
        try:
            message = self._answer(address, "/health", None, min(self.timeout, HEALTH_SECONDS))
            name = message.get("name")
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise RewardError(f"{address.label} is no reward server: it gives no name")
            return name
        except RewardError as error:
            return error

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return scores (B,), float32; NaN where the server has no score, or none answers and failures are masked."""
        starts = range(0, len(prompts), self.batch_size)
        chunks = [slice(start, start + self.batch_size) for start in starts]

        def score(i: int) -> Tensor:
            rows = chunks[i]
            return self._score(i, images[rows], list(prompts[rows]), list(metadata[rows]))

        with ThreadPoolExecutor(len(self.addresses)) as executor:
            return torch.cat(list(executor.map(score, range(len(chunks)))))

    def _score(self, first: int, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        """One request, sent to endpoint `first` and then to the others, in rounds."""
        message = encode_images(images, self.format) | {"prompts": prompts}
        try:
            body = json.dumps(message | {"metadata": encode_metadata(metadata)}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestRefused(f"a remote reward's metadata must be JSON: {error}") from error
        fault: Exception | None = None
        told: list[float] = []
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(pause(self.retry_delay * 2 ** (attempt - 1), min(told), self.timeout))
            told = []
            for offset in range(len(self.addresses)):
                address = self.addresses[(first + offset) % len(self.addresses)]
                try:
                    return self._ask(address, body, len(prompts))
                except RequestRefused:
                    raise
                except RewardError as error:
                    fault = error
                    told.append(getattr(error, "retry_after", None) or 0.0)
        if self.on_failure == "mask":
            warnings.warn(f"remote reward: {len(prompts)} images get no score ({fault})", stacklevel=2)
            return torch.full((len(prompts),), torch.nan)
        raise RewardError(
            f"remote reward {self.__name__!r}: no endpoint scored {len(prompts)} images: {fault}"
        ) from fault

    def _ask(self, address: Address, body: bytes, number: int) -> Tensor:
        values = self._answer(address, "/score", body, self.timeout).get("rewards")
        if not isinstance(values, list) or any(isinstance(v, (bool, str)) for v in values):
            raise RewardError(f"{address.label} answered without a list of numbers as its rewards")
        return as_rewards(address.label, values, number)

    def _answer(self, address: Address, path: str, body: bytes | None, deadline: float) -> dict[str, Any]:
        """The JSON object that an endpoint answers; any fault of the other side's is a RewardError."""
        try:
            answer = fetch(address, path, body=body, token=self.secret, deadline=deadline)
            if answer.status == 200:
                return answer.json_object()
        except WebError as error:
            raise RewardError(str(error)) from error
        if answer.status in REFUSED:
            raise RequestRefused(f"{address.label} refused the request, {answer.status}: {answer.text()}")
        raise EndpointFailed(f"{address.label} answered {answer.status}: {answer.text()}", answer.retry_after)
