"""UnifiedReward (Wang et al. 2025): a vision-language judge behind an OpenAI-compatible endpoint (vLLM, SGLang)."""

from __future__ import annotations

import base64
import json
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.preprocessing import to_uint8
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.rewards.web import WebError, fetch, parse_address, pause, printable
from trl_tafs.rewards.wire import png

# The pointwise question that the model was trained to answer; in other words its scores are others.
QUESTION = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the "
    "provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
PASSING = (408, 409, 429)  # answers below 500 after which another try may help
SCORE = re.compile(r"Final Score:\s*\**\s*([1-5](?:\.\d+)?)(?![\d.]*\d)")


def parse_score(answer: str | None) -> float | None:
    """Return the number in [1, 5] after "Final Score:"; None where there is none."""
    found = SCORE.search(answer or "")
    value = float(found[1]) if found else None
    return value if value is not None and value <= 5 else None


class UnifiedReward:
    """The judge's score, 1 to 5; no score where its answer holds none.

    Args:
        base_url: of the endpoint, `http://host:port/v1`; by default from the environment's OPENAI_BASE_URL.
        model: the served model's name; by default the only one that is served.
        api_key: by default from the environment's OPENAI_API_KEY; servers without keys take any.
        concurrency: questions at once.
        timeout: seconds for one answer, from connecting to its last byte.
        max_retries: of one question, with back-off, or after the server's Retry-After where that is longer, but not
            longer than `timeout`.
        max_tokens: of an answer.
        on_failure: what becomes of an image whose question fails: "error", or "mask", no score.
    """

    __name__ = "unified_reward"
    title = "UnifiedReward"

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 2,
        max_tokens: int = 512,
        on_failure: str = "error",
    ) -> None:
        if on_failure not in ("error", "mask"):
            raise ValueError(f"unified_reward: on_failure is {on_failure!r}; use error or mask")
        if concurrency < 1 or not 0 < timeout < float("inf") or max_retries < 0:
            raise ValueError(
                f"unified_reward: concurrency {concurrency}, timeout {timeout}, max_retries {max_retries} can't work"
            )
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not base_url:
            raise ValueError("unified_reward needs base_url (http://host:port/v1), or OPENAI_BASE_URL set")
        self.address, self.key = parse_address(base_url), api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.max_tokens, self.on_failure = max_tokens, on_failure
        self.model = self._served(model)

    def _served(self, model: str | None) -> str:
        """Return the model's name, after asking what is served: the endpoint's health check."""
        try:
            entries = self._call("/models", None).get("data")
        except WebError as error:
            raise ValueError(f"unified_reward: {self.address.label} doesn't answer ({error})") from error
        entries = entries if isinstance(entries, list) else []
        names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if (model is None and len(names) != 1) or (model is not None and model not in names):
            served = printable(", ".join(names)) or "none"
            raise ValueError(f"unified_reward: model is {model!r}; {self.address.label} serves {served}")
        return model or names[0]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores (B,); NaN for no score."""
        pictures = to_uint8(images).numpy()
        with ThreadPoolExecutor(self.concurrency) as executor:
            scores = list(executor.map(self._ask, pictures, prompts))
        return torch.tensor([torch.nan if score is None else score for score in scores])

    def _ask(self, picture: Any, prompt: str) -> float | None:
        url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode('ascii')}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION.replace("{prompt}", prompt)},
        ]
        question = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        try:
            return parse_score(answer_text(self._call("/chat/completions", json.dumps(question).encode())))
        except WebError as error:
            if self.on_failure == "mask":
                warnings.warn(f"unified_reward: {error}; an image gets no score", stacklevel=2)
                return None
            raise RewardError(f"unified_reward: {self.address.label} failed: {error}") from error

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
