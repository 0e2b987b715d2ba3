"""GenEval 2 (Kamath et al. 2025): Soft-TIFA, a prompt's atoms asked of a vision-language model behind an endpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trl_tafs.rewards.judge import VisionJudge
from trl_tafs.rewards.web import WebError

NUMBERS = "one two three four five six seven eight nine ten".split()
YES = frozenset({"Yes", "yes", " yes", " Yes"})
TOP_LOGPROBS = 20  # as many as the interface gives
MEANS = ("arithmetic", "geometric")


def accepted(question: str, answer: str) -> frozenset[str]:
    """Return the tokens that count as the right answer, as the benchmark has them: numbers as words and digits."""
    if not question.startswith("How many"):
        return YES
    digit = str(NUMBERS.index(answer) + 1) if answer in NUMBERS else "other"
    words = (answer, answer.capitalize(), digit)
    return frozenset({*words, *(f" {word}" for word in words)})


def answer_probability(completion: Mapping[str, Any], right: frozenset[str]) -> float:
    """Return the probability that an answer's first token is one of `right`, as far as the likeliest 20 tell.

    Raises:
        WebError: the completion has no log-probabilities.
    """
    try:
        likeliest = completion["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = [(str(entry["token"]), float(entry["logprob"])) for entry in likeliest]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WebError("the answer holds no top_logprobs; serve the model with log-probabilities") from error
    return sum(math.exp(min(logprob, 0.0)) for token, logprob in found if token in right)


def check_row(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if a prompt's `vqa_list` isn't a list of pairs of question and answer."""
    pairs = metadata["vqa_list"]
    rows = isinstance(pairs, (list, tuple)) and len(pairs) > 0
    if not rows or any(
        not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise ValueError(f"geneval2: vqa_list is {pairs!r:.100}, which isn't a list of [question, answer]")


class GenEval2(VisionJudge):
    """The mean probability of the right answers to a prompt's questions, in [0, 1]; no score without `vqa_list`.

    The benchmark's judge is Qwen3-VL-8B-Instruct. It sums over the whole vocabulary, an endpoint tells the likeliest 20
    tokens: what is further down adds less than the least of them.

    Args:
        mean: "arithmetic", the share of the atoms (Soft-TIFA AM); "geometric", which is low where one atom is missing
            (Soft-TIFA GM, the benchmark's score of a prompt).
        options: see `VisionJudge`.
    """

    __name__ = "geneval2"
    title = "GenEval 2"
    evaluation_options = {"mean": "geometric"}

    def __init__(
        self, base_url: str | None = None, model: str | None = None, mean: str = "arithmetic", **options: Any
    ) -> None:
        if mean not in MEANS:
            raise ValueError(f"geneval2: mean is {mean!r}; use {' or '.join(MEANS)}")
        self.mean = mean
        super().__init__(base_url, model, **options)

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Return whether the prompt is one of the benchmark's rows, its questions among its metadata."""
        if metadata.get("vqa_list") is None:
            return False
        check_row(metadata)
        return True

    def judge(self, picture: Any, prompt: str, metadata: Mapping[str, Any]) -> float | None:
        """Return the score of a picture (H, W, 3) uint8; None where the prompt has no questions."""
        if not self.applies(prompt, metadata):
            return None
        probabilities = []
        for question, answer in metadata["vqa_list"]:
            told = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            completion = self.ask([picture], f"{question} Answer in one word.", 1, **told)
            probabilities.append(answer_probability(completion, accepted(question, answer)))
        if self.mean == "arithmetic":
            return sum(probabilities) / len(probabilities)
        return math.prod(probabilities) ** (1 / len(probabilities))
