"""A tiny Qwen2-VL and Qwen2.5-VL with weights by a formula, for transformers of then and now."""

from pathlib import Path

import cases
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
END, REWARD = "<|endoftext|>", "<|Reward|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 2, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
VISION_2 = VISION | {"embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
VISION_2_5 = VISION | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
VISION_2_5 |= {"window_size": 56, "fullatt_block_indexes": [1]}


def tokenizer():
    """One token a byte, so that every letter of an instruction counts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    special = {"pad_token": END, "eos_token": END, "additional_special_tokens": SPECIAL}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=TEMPLATE, model_input_names=names, **special)


def processor(**more):
    """Qwen2-VL's, also Qwen2.5-VL's; `more` is the video's processor, where transformers wants one."""
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer(), chat_template=TEMPLATE, **more)


def token_ids():
    """The places that a configuration names."""
    words = tokenizer()
    named = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    named |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: words.convert_tokens_to_ids(token) for name, token in named.items()}
    return ids | {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}


def save(folder: Path, kind: str = "qwen2_vl") -> Path:
    """A folder of the tiny base: configuration and processor, by the transformers of now."""
    from transformers import AutoConfig, Qwen2VLVideoProcessor

    ids = token_ids()
    vocabulary = {name: ids.pop(name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    vision = VISION_2 if kind == "qwen2_vl" else VISION_2_5
    config = AutoConfig.for_model(kind, text_config=TEXT | vocabulary, vision_config=vision, **ids)
    config.save_pretrained(folder)
    processor(video_processor=Qwen2VLVideoProcessor()).save_pretrained(folder)
    return folder


def fill(state):
    """Weights by the names of transformers before 4.52, which the checkpoints have."""
    return cases.fill(state)
