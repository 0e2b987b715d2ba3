"""HPSv3 (Ma et al. 2025): Qwen2-VL-7B with a head that reads the preference at a token of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.model import ModelReward, hub_file
from trl_tafs.rewards.vision_language import (
    REWARD_TOKEN,
    backbone,
    chat_inputs,
    moved,
    plain_positions,
    rank_head,
    reward_processor,
)

HPS_V3, CHECKPOINT = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # of an image, whatever its size
# The instruction that the weights were trained with (MizzenAI/HPSv3, MIT); in other words the scores are others.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense "
    "of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, "
    "or adult material. If such content is present, the image quality and satisfaction score should be the "
    "lowest possible. \n\n**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance the "
    "subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\nTextual prompt - {text_prompt}\n\n\n\n"
    "Please provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)


class HPSv3(ModelReward):
    """The mean of the preference that the model predicts, about -5 to 15.

    Args:
        checkpoint: the Hub's repository, a folder or a file of the weights.
        base: the model that was tuned, whose configuration and processor are read.
        options: see `ModelReward`; bfloat16 by default, the head in float32.
    """

    title = "HPSv3"

    def __init__(self, checkpoint: str = HPS_V3, base: str = BASE, **options: Any) -> None:
        from safetensors.torch import load_file

        super().__init__(**({"dtype": torch.bfloat16, "batch_size": 8} | options))
        self.processor = reward_processor(base)
        state = load_file(hub_file(checkpoint, CHECKPOINT))
        self.model = self.adopt(backbone(base, len(self.processor.tokenizer), state))
        head = rank_head(self.model.config.get_text_config().hidden_size)
        head.load_state_dict({k.removeprefix("rm_head."): v for k, v in state.items() if k.startswith("rm_head.")})
        self.head = self.adopt(head).float()
        self.token = self.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        texts = [INSTRUCTION.replace("{text_prompt}", prompt.replace(REWARD_TOKEN, "")) for prompt in prompts]
        inputs = chat_inputs(self.processor, [[image] for image in images], texts, PIXELS, PIXELS)
        inputs = moved(inputs, self.device, self.dtype)
        positions = plain_positions(inputs["attention_mask"])
        hidden = self.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return self.head(hidden[inputs["input_ids"] == self.token].float())[:, 0]
