"""A reward in another process or on another machine, served by `trl-tafs serve-reward`."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.scoring import RewardError, RewardRefused, as_rewards
from trl_tafs.rewards.wire import FORMATS, SECRET, encode_images

REFUSED = (400, 401, 403, 413)  # answers that asking again doesn't change


class RequestRefused(RewardRefused):
    """The server won't take the request: neither another try nor another endpoint helps."""


class RemoteReward:
    """The served reward's scores. Several endpoints share the work, and stand in for each other.

    When it is made, every endpoint is asked for its health: one must answer.

    Args:
        endpoints: `http://host:port`, one or several.
        format: "png", rounded to 8 bits; "raw", float32 as it is, several times as large.
        batch_size: images of one request.
        timeout: seconds for one request.
        max_retries: rounds over the endpoints after the first.
        retry_delay: seconds before the second round, doubled each time.
        on_failure: what becomes of images that no endpoint scored: "error", or "mask", no verdict (NaN).
        secret: for servers that ask for one; by default from the environment's TRL_TAFS_REWARD_SECRET.
    """

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
        if batch_size < 1 or timeout <= 0 or max_retries < 0:
            raise ValueError(
                f"remote: batch_size {batch_size}, timeout {timeout}, max_retries {max_retries} can't work"
            )
        self.endpoints = [url.rstrip("/") for url in ([endpoints] if isinstance(endpoints, str) else endpoints)]
        if not self.endpoints:
            raise ValueError("remote needs at least one endpoint, http://host:port")
        self.format, self.batch_size, self.timeout, self.on_failure = format, batch_size, timeout, on_failure
        self.max_retries, self.retry_delay = max_retries, retry_delay
        self.secret = secret or os.environ.get(SECRET)
        self._local = threading.local()
        self.__name__ = self.check_health()

    def check_health(self) -> str:
        """Ask all endpoints; the name of what they serve.

        Raises:
            ValueError: none answers, one refuses the secret, or they serve different rewards.
        """
        import requests

        names, faults = {}, {}
        for url in self.endpoints:
            try:
                answer = self._session().get(f"{url}/health", timeout=min(self.timeout, 10.0))
                answer.raise_for_status()
                names[url] = str(answer.json()["name"])
            except (requests.RequestException, ValueError, KeyError) as error:  # the machine's edge
                faults[url] = error
        if not names:
            told = "; ".join(f"{url}: {error}" for url, error in faults.items())
            raise ValueError(f"no reward server answers ({told}); start one by trl-tafs serve-reward, or set {SECRET}")
        if len(set(names.values())) > 1:
            raise ValueError(f"the endpoints serve different rewards: {names}; make a remote reward of each")
        for url, error in faults.items():
            warnings.warn(f"reward server {url} doesn't answer ({error}); the others do its work", stacklevel=3)
        return next(iter(names.values()))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B,) float32; NaN where the server has no verdict, or none answered and failures are masked."""
        starts = range(0, len(prompts), self.batch_size)
        chunks = [slice(start, start + self.batch_size) for start in starts]

        def score(i: int) -> Tensor:
            rows = chunks[i]
            return self._score(i, images[rows], list(prompts[rows]), list(metadata[rows]))

        with ThreadPoolExecutor(len(self.endpoints)) as executor:
            return torch.cat(list(executor.map(score, range(len(chunks)))))

    def _score(self, first: int, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        """One request, sent to endpoint `first` and then to the others, in rounds."""
        import requests

        message = encode_images(images, self.format) | {"prompts": prompts, "metadata": metadata}
        try:
            body = json.dumps(message)
        except TypeError as error:
            raise RequestRefused(f"a remote reward's metadata must be JSON: {error}") from error
        fault: Exception | None = None
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(self.retry_delay * 2 ** (attempt - 1))
            for offset in range(len(self.endpoints)):
                url = self.endpoints[(first + offset) % len(self.endpoints)]
                try:
                    return self._ask(url, body, len(prompts))
                except RequestRefused:
                    raise
                except (requests.RequestException, RewardError) as error:
                    fault = error
        if self.on_failure == "mask":
            warnings.warn(f"remote reward: {len(prompts)} images get no verdict ({fault})", stacklevel=2)
            return torch.full((len(prompts),), torch.nan)
        raise RewardError(
            f"remote reward {self.__name__!r}: no endpoint scored {len(prompts)} images: {fault}"
        ) from fault

    def _ask(self, url: str, body: str, number: int) -> Tensor:
        headers = {"Content-Type": "application/json"}
        answer = self._session().post(f"{url}/score", data=body, timeout=self.timeout, headers=headers)
        if answer.status_code in REFUSED:
            raise RequestRefused(f"{url} refused the request, {answer.status_code}: {answer.text[:300]}")
        if answer.status_code != 200:
            raise RewardError(f"{url} answered {answer.status_code}: {answer.text[:300]}")
        try:
            values = answer.json()["rewards"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(f"{url} answered what is no list of rewards: {answer.text[:100]!r}") from error
        return as_rewards(url, values, number)

    def _session(self) -> Any:
        """A session a thread: requests' aren't made to be shared."""
        if not hasattr(self._local, "session"):
            import requests

            self._local.session = requests.Session()
            if self.secret:
                self._local.session.headers["Authorization"] = f"Bearer {self.secret}"
        return self._local.session
