"""EditReward (Wu et al. 2025): Qwen2.5-VL-7B with two heads, of whether an edit follows its prompt and how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_tafs.rewards.model import ModelReward, hub_file
from trl_tafs.rewards.pixel_faithfulness import as_tensor, source_of
from trl_tafs.rewards.vision_language import (
    REWARD_TOKEN,
    backbone,
    chat_inputs,
    moved,
    plain_positions,
    rank_head,
    reward_processor,
)

CHECKPOINT = "model.safetensors"
BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # of an image, whatever its size
# What the weights were trained with, a question a head (TIGER-AI-Lab/EditReward, MIT); in other words the scores are
# others.
FOLLOWING = (
    "\nYou are tasked with evaluating an edited image **in comparison with the original source image** based on "
    "**Instruction Following & Semantic Fidelity**, and assigning a score from 1 to 4, with 1 being the worst and "
    "4 being the best.  \n"
    "This dimension focuses on how accurately, completely, and exclusively the model executed the given text "
    "instruction.\n\n**Inputs Provided:**  \n- Source Image (before editing)  \n"
    "- Edited Image (after applying the instruction)  \n- Text Instruction  \n\n**Sub-Dimensions to Evaluate:**\n"
    "\n- **Semantic Accuracy:**  \n"
    "  Assess whether the edited content accurately captures the semantics of the instruction. The edited result "
    'should precisely match the intended meaning. For example, if the instruction is "replace apples with '
    'oranges," the object must clearly be oranges, not other fruits.\n\n- **Completeness of Editing:**  \n'
    '  Check whether **all parts** of the instruction are fully executed. For multi-step edits (e.g., "replace a '
    'red car with a blue bicycle"), both the color change and the object replacement must be done without '
    "omissions.\n\n- **Exclusivity of Edit (No Over-Editing):**  \n"
    "  Ensure that only the requested parts are changed. The rest of the image (as seen in the source) should "
    "remain unaltered. For example, if the instruction only involves replacing an object, the background, "
    "lighting, and unrelated objects should not be unnecessarily modified.\n\n**Scoring Criteria:**\n"
    "- **4 (Very Good):** Perfectly accurate, complete, and exclusive execution of the instruction.  \n"
    "- **3 (Relatively Good):** Largely correct, but with minor omissions or slight over-editing.  \n"
    "- **2 (Relatively Poor):** Major misinterpretation, incomplete edits, or noticeable unintended changes.  \n"
    "- **1 (Very Poor):** Instruction ignored or completely wrong execution.\n\nText instruction - {text_prompt}\n"
)
QUALITY = (
    "\nYou are tasked with evaluating an edited image **in comparison with the original source image** based on "
    "**Visual Quality & Realism**, and assigning a score from 1 to 4, with 1 being the worst and 4 being the best. "
    " \nThis dimension focuses on how realistic, artifact-free, and aesthetically appealing the edited image is, "
    "while remaining consistent with the source image.\n\n**Inputs Provided:**  \n"
    "- Source Image (before editing)  \n- Edited Image (after applying the instruction)  \n- Text Instruction  \n"
    "\n**Sub-Dimensions to Evaluate:**\n\n- **Plausibility & Physical Consistency:**  \n"
    "  Check whether the edit aligns with the laws of physics and the scene context. Lighting, shadows, "
    "reflections, perspective, size, and interactions with the environment should all appear natural compared to "
    "the source image.\n\n- **Artifact-Free Quality:**  \n"
    "  Look for technical flaws such as blur, distortions, pixel misalignment, unnatural textures, or seams around "
    "edited regions. High-quality results should be free from such visible artifacts.\n\n"
    "- **Aesthetic Quality:**  \n"
    "  Evaluate the overall harmony and visual appeal. The image should look natural, balanced, and pleasant. "
    "Colors, composition, and atmosphere should enhance the image rather than degrade it.\n\n"
    "**Scoring Criteria:**\n"
    "- **4 (Very Good):** Perfectly realistic, artifact-free, seamless, and aesthetically pleasing.  \n"
    "- **3 (Relatively Good):** Mostly realistic and clean, with only minor flaws that do not significantly "
    "distract.  \n"
    "- **2 (Relatively Poor):** Noticeable physical inconsistencies or visible artifacts that make the edit "
    "unnatural.  \n- **1 (Very Poor):** Severe artifacts, incoherent composition, or visually unusable result.\n\n"
    "Text instruction - {text_prompt}\n"
)
END = "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
HEADS = {"following": FOLLOWING, "quality": QUALITY}  # in the checkpoint's order


class EditReward(ModelReward):
    """The mean preference of the heads for an edit of the source picture, about -3 to 3.

    Args:
        checkpoint: a repository on the Hub, a folder or a file of the weights, of two heads: one of the authors' (the
            Hub's TIGER-Lab) for Qwen2.5-VL.
        base: the model that was tuned, whose configuration and processor are read.
        heads: whose mean is the score: "following", "quality" or both, as the authors' configuration has it.
        options: see `ModelReward`; bfloat16 by default, the heads in float32.
    """

    title = "EditReward"

    def __init__(
        self,
        checkpoint: str | None = None,
        base: str = BASE,
        heads: str | Sequence[str] = tuple(HEADS),
        **options: Any,
    ) -> None:
        from safetensors.torch import load_file

        self.names = (heads,) if isinstance(heads, str) else tuple(heads)
        if not self.names or not set(self.names) <= set(HEADS):
            raise ValueError(f"edit_reward: heads is {heads!r}; use {' or '.join(HEADS)}, or both")
        if checkpoint is None:
            raise ValueError("edit_reward needs checkpoint: a folder or a repository of EditReward's weights")
        super().__init__(**({"dtype": torch.bfloat16, "batch_size": 4} | options))
        self.processor = reward_processor(base)
        state = load_file(hub_file(checkpoint, CHECKPOINT))
        self.model = self.adopt(backbone(base, len(self.processor.tokenizer), state))
        self.token = self.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self.heads = {}
        for i, name in enumerate(HEADS):
            head, prefix = rank_head(self.model.config.get_text_config().hidden_size), f"rm_heads.head_{i}."
            head.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            self.heads[name] = self.adopt(head).float()

    def applies(self, prompt: str, metadata: Mapping[str, Any]) -> bool:
        """Raise ValueError for a row without a source picture."""
        source_of(metadata, "edit_reward")
        return True

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the scores, (B,)."""
        pairs = [[as_tensor(source_of(row, "edit_reward")), image] for image, row in zip(images, metadata, strict=True)]
        found = []
        for name in self.names:
            asked = [prompt.replace(REWARD_TOKEN, "") for prompt in prompts]
            texts = [HEADS[name].replace("{text_prompt}", prompt) + END for prompt in asked]
            inputs = moved(chat_inputs(self.processor, pairs, texts, PIXELS, PIXELS), self.device, self.dtype)
            positions = plain_positions(inputs["attention_mask"])
            hidden = self.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
            found.append(self.heads[name](hidden[inputs["input_ids"] == self.token].float())[:, 0])
        return torch.stack(found).mean(0)
