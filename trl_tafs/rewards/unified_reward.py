"""UnifiedReward (Wang et al. 2025): a vision-language judge behind an OpenAI-compatible endpoint (vLLM, SGLang)."""

from __future__ import annotations

import base64
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.preprocessing import to_uint8
from trl_tafs.rewards.scoring import RewardError
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
SCORE = re.compile(r"Final Score:\s*\**\s*([1-5](?:\.\d+)?)(?![\d.]*\d)")


def parse_score(answer: str | None) -> float | None:
    """The number in [1, 5] after "Final Score:"; None where there is none."""
    found = SCORE.search(answer or "")
    value = float(found[1]) if found else None
    return value if value is not None and value <= 5 else None


class UnifiedReward:
    """The judge's score, 1 to 5; no verdict where its answer holds none.

    Args:
        base_url: of the endpoint, `http://host:port/v1`; by default from the environment's OPENAI_BASE_URL.
        model: the served model's name; by default the only one that is served.
        api_key: by default from the environment's OPENAI_API_KEY; servers without keys take any.
        concurrency: questions at once.
        timeout: seconds for one answer.
        max_retries: of one question, with back-off, by the client library.
        max_tokens: of an answer.
        on_failure: what becomes of an image whose question fails: "error", or "mask", no verdict.
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
        import openai

        if on_failure not in ("error", "mask"):
            raise ValueError(f"unified_reward: on_failure is {on_failure!r}; use error or mask")
        if base_url is None and not os.environ.get("OPENAI_BASE_URL"):
            raise ValueError("unified_reward needs base_url (http://host:port/v1), or OPENAI_BASE_URL set")
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=max_retries)
        self.concurrency, self.max_tokens, self.on_failure = concurrency, max_tokens, on_failure
        self.model = self._served(model)

    def _served(self, model: str | None) -> str:
        """The model's name, after a look at what is served: the endpoint's health check."""
        import openai

        try:
            names = [entry.id for entry in self.client.models.list()]
        except openai.OpenAIError as error:
            raise ValueError(f"unified_reward: {self.client.base_url} doesn't answer ({error})") from error
        if (model is None and len(names) != 1) or (model is not None and model not in names):
            raise ValueError(f"unified_reward: model is {model!r}; {self.client.base_url} serves {', '.join(names)}")
        return model or names[0]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B,); NaN for no verdict."""
        pictures = to_uint8(images).numpy()
        with ThreadPoolExecutor(self.concurrency) as executor:
            scores = list(executor.map(self._ask, pictures, prompts))
        return torch.tensor([torch.nan if score is None else score for score in scores])

    def _ask(self, picture: Any, prompt: str) -> float | None:
        import openai

        url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode('ascii')}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION.replace("{prompt}", prompt)},
        ]
        try:
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=self.max_tokens,
            )
            return parse_score(answer.choices[0].message.content if answer.choices else None)
        except openai.OpenAIError as error:
            if self.on_failure == "mask":
                warnings.warn(f"unified_reward: {error}; an image gets no verdict", stacklevel=2)
                return None
            raise RewardError(f"unified_reward: {self.client.base_url} failed: {error}") from error
