"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang), asked about images."""

from __future__ import annotations

import base64
import json
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.preprocessing import to_uint8
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.rewards.web import WebError, fetch, parse_address, pause, printable
from trl_tafs.rewards.wire import png

PASSING = (408, 409, 429)  # answers below 500 after which another try may help


class VisionJudge(ABC):
    """A reward whose score is made of a model's answers to questions about an image; a subclass asks them.

    Args:
        base_url: of the endpoint, `http://host:port/v1`; by default from the environment's OPENAI_BASE_URL.
        model: the served model's name; by default the only one that is served.
        api_key: by default from the environment's OPENAI_API_KEY; servers without keys take any.
        concurrency: images at once.
        timeout: seconds for one answer, from connecting to its last byte.
        max_retries: of one question, with back-off, or after the server's Retry-After where that is longer, but not
            longer than `timeout`.
        on_failure: what becomes of an image whose question fails: "error", or "mask", no score.
    """

    __name__: str
    title: str
    runs_in_threads = True

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 2,
        on_failure: str = "error",
    ) -> None:
        if on_failure not in ("error", "mask"):
            raise ValueError(f"{self.__name__}: on_failure is {on_failure!r}; use error or mask")
        if concurrency < 1 or not 0 < timeout < float("inf") or max_retries < 0:
            raise ValueError(
                f"{self.__name__}: concurrency {concurrency}, timeout {timeout}, max_retries {max_retries} can't work"
            )
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not base_url:
            raise ValueError(f"{self.__name__} needs base_url (http://host:port/v1), or OPENAI_BASE_URL set")
        self.address, self.key = parse_address(base_url), api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.on_failure = on_failure
        self.model = self._served(model)

    def _served(self, model: str | None) -> str:
        """Return the model's name, after asking what is served: the endpoint's health check."""
        try:
            entries = self._call("/models", None).get("data")
        except WebError as error:
            raise ValueError(f"{self.__name__}: {self.address.label} doesn't answer ({error})") from error
        entries = entries if isinstance(entries, list) else []
        names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if (model is None and len(names) != 1) or (model is not None and model not in names):
            served = printable(", ".join(names)) or "none"
            raise ValueError(f"{self.__name__}: model is {model!r}; {self.address.label} serves {served}")
        return model or names[0]

    @abstractmethod
    def judge(self, picture: Any, prompt: str, metadata: Mapping[str, Any]) -> float | None:
        """Return the score of a picture (H, W, 3) uint8; None for no score."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores (B,); NaN for no score."""
        pictures = to_uint8(images).numpy()
        with ThreadPoolExecutor(self.concurrency) as executor:
            scores = list(executor.map(self._judge, pictures, prompts, metadata))
        return torch.tensor([torch.nan if score is None else score for score in scores])

    def _judge(self, picture: Any, prompt: str, metadata: Mapping[str, Any]) -> float | None:
        try:
            return self.judge(picture, prompt, metadata)
        except WebError as error:
            if self.on_failure == "mask":
                warnings.warn(f"{self.__name__}: {error}; an image gets no score", stacklevel=2)
                return None
            raise RewardError(f"{self.__name__}: {self.address.label} failed: {error}") from error

    def ask(self, pictures: Sequence[Any], text: str, max_tokens: int, **options: Any) -> dict[str, Any]:
        """Return the chat completion of a question about pictures (H, W, 3) uint8, which stand before the text.

        Raises:
            WebError: the endpoint doesn't answer it.
        """
        content: list[dict[str, Any]] = []
        for picture in pictures:
            url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode('ascii')}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": text})
        question = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        question |= {"max_tokens": max_tokens} | options
        return self._call("/chat/completions", json.dumps(question).encode())

    def _call(self, path: str, body: bytes | None) -> dict[str, Any]:
        """The object that the endpoint answers, asked again with back-off while another try may help."""
        for attempt in range(self.max_retries + 1):
            retry_after = None
            try:
                answer = fetch(self.address, path, body=body, token=self.key, deadline=self.timeout)
                if answer.status == 200:
                    return answer.json_object()
                fault = WebError(f"{self.address.label} answered {answer.status}: {answer.text()}")
                retry_after = answer.retry_after
                if answer.status < 500 and answer.status not in PASSING:
                    break
            except WebError as error:
                fault = error
            if attempt < self.max_retries:
                time.sleep(pause(min(0.5 * 2**attempt, 8.0), retry_after, self.timeout))
        raise fault


def answer_text(answer: Mapping[str, Any]) -> str | None:
    """Return the text of a chat completion; None where there is none."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None
