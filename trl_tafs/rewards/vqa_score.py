"""VQAScore (Lin et al. 2024): how likely a vision-language model is to say yes, the image shows the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.model import ModelReward
from trl_tafs.rewards.vision_language import chat_inputs, moved

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
MIN_TOKENS, MAX_TOKENS = 4, 16384  # of an image


class VQAScore(ModelReward):
    """The probability of the answer `Yes` to one question, in [0, 1], as t2v_metrics computes it with Qwen2.5-VL.

    It is the first token's, after what the checkpoint's own generation settings do to it (Qwen2.5-VL's repetition
    penalty).

    Args:
        model: a Qwen-VL model, on the Hub or in a local folder.
        question: with `{}` where the prompt goes.
        answer: whose first token counts.
        options: see `ModelReward`; bfloat16 by default.
    """

    title = "VQAScore"

    def __init__(self, model: str = MODEL, question: str = QUESTION, answer: str = "Yes", **options: Any) -> None:
        if question.count("{}") != 1:
            raise ValueError(f"vqa_score: question is {question!r}; write {{}} once, where the prompt goes")
        super().__init__(**({"dtype": torch.bfloat16, "batch_size": 8} | options))
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(model)
        self.processor.tokenizer.padding_side = "left"
        self.model = self.adopt(AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype))
        self.question = question
        self.token = self.processor.tokenizer.encode(answer, add_special_tokens=False)[0]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        images_of = self.processor.image_processor
        area = (images_of.patch_size * images_of.merge_size) ** 2
        texts = [self.question.replace("{}", prompt) for prompt in prompts]
        inputs = chat_inputs(self.processor, [[image] for image in images], texts, MIN_TOKENS * area, MAX_TOKENS * area)
        output = self.model.generate(
            **moved(inputs, self.device, self.dtype),
            max_new_tokens=1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return output.scores[0].float().softmax(-1)[:, self.token]
