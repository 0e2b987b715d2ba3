"""UnifiedReward (Wang et al. 2025): a vision-language judge behind an OpenAI-compatible endpoint (vLLM, SGLang)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_tafs.rewards.judge import VisionJudge, answer_text

# The pointwise questions that the models were trained to answer; in other words their scores are others.
QUESTION = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the "
    "provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
QUESTION_2 = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\nProvide overall assessments for the "
    "image along the following axes (each rated from 1 to 5):\n- Alignment Score: How well the image matches the "
    "caption in terms of content.\n- Coherence Score: How logically consistent the image is (absence of visual "
    "glitches, object distortions, etc.).\n- Style Score: How aesthetically appealing the image looks, "
    "regardless of caption accuracy.\n\nOutput your evaluation using the format below:\n\nAlignment Score (1-5): "
    "X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: "
    "[{prompt}]"
)
AXES = ("alignment", "coherence", "style")
SCORE = re.compile(r"Final Score:\s*\**\s*([1-5](?:\.\d+)?)(?![\d.]*\d)")


AXIS_SCORE = r"{axis} Score \(1-5\):\s*\**\s*([0-5](?:\.\d+)?)(?![\d.]*\d)"


def parse_score(answer: str | None) -> float | None:
    """Return the number in [1, 5] after "Final Score:"; None where there is none."""
    found = SCORE.search(answer or "")
    value = float(found[1]) if found else None
    return value if value is not None and value <= 5 else None


def parse_axes(answer: str | None, axes: Sequence[str]) -> float | None:
    """Return the mean of the axes' numbers in [0, 5]; None where one is missing."""
    found = [re.search(AXIS_SCORE.format(axis=axis.capitalize()), answer or "") for axis in axes]
    values = [float(one[1]) for one in found if one is not None]
    return sum(values) / len(values) if len(values) == len(found) and max(values) <= 5 else None


class UnifiedReward(VisionJudge):
    """The judge's score, 1 to 5; no score where its answer holds none.

    Args:
        version: "1.0", one final score; "2.0", of the models UnifiedReward-2.0 and later: alignment, coherence and
            style, each its own number.
        axes: of version 2.0, whose mean is the score: some of "alignment", "coherence" and "style"; all by default.
        max_tokens: of an answer.
        options: see `VisionJudge`.
    """

    __name__ = "unified_reward"
    title = "UnifiedReward"

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        version: str = "1.0",
        axes: Sequence[str] | None = None,
        max_tokens: int = 512,
        **options: Any,
    ) -> None:
        if str(version) not in ("1.0", "2.0"):
            raise ValueError(f"unified_reward: version is {version!r}; use 1.0 or 2.0")
        self.version, chosen = str(version), [axes] if isinstance(axes, str) else axes
        if chosen is not None and self.version == "1.0":
            raise ValueError(f"unified_reward: axes is {axes!r}, and version 1.0 has one score; use version 2.0")
        self.axes, self.max_tokens = tuple(AXES if chosen is None else chosen), max_tokens
        if not self.axes or not set(self.axes) <= set(AXES):
            raise ValueError(f"unified_reward: axes is {axes!r}; use some of {', '.join(AXES)}")
        super().__init__(base_url, model, **options)

    def judge(self, picture: Any, prompt: str, metadata: Mapping[str, Any]) -> float | None:
        """Return the score of a picture (H, W, 3) uint8; None where the answer holds none."""
        question = QUESTION if self.version == "1.0" else QUESTION_2
        answer = answer_text(self.ask([picture], question.replace("{prompt}", prompt), self.max_tokens))
        return parse_score(answer) if self.version == "1.0" else parse_axes(answer, self.axes)
