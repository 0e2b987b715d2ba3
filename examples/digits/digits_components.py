"""A complete Stable Diffusion 3 pipeline of half a million weights, built in memory from configs alone.

Every class is diffusers' or transformers' own, only small: 8x8 images, a one-block VAE whose latents have the
images' size (1 channel, so D = 64), two CLIP text encoders, a T5 encoder and a flow-matching scheduler.
"""

from collections import Counter
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PIPELINE = Path(__file__).with_name("pipeline")  # where pretrain.py puts the trained one
IMAGE_SIZE = 8
MAX_LENGTH = 8  # tokens of a prompt, for CLIP and for T5: pass max_sequence_length=MAX_LENGTH to the pipeline
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", "the", "by", "hand", "handwritten", "written", "digit", "number", *DIGIT_WORDS)
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def byte_pair_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is a single token."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in splits for pair in zip(parts, parts[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = [_merge(parts, best) for parts in splits]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(parts):
        joined = tuple(parts[i : i + 2]) == pair
        merged.append("".join(pair) if joined else parts[i])
        i += 2 if joined else 1
    return merged


def clip_tokenizer(words: tuple[str, ...] = WORDS, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """A CLIP tokenizer that knows `words` whole and spells any other word in letters."""
    merges = byte_pair_merges(words)
    pieces = [*ALPHABET, *(letter + "</w>" for letter in ALPHABET), *("".join(pair) for pair in merges)]
    pieces = ["<|startoftext|>", *dict.fromkeys(pieces), "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=max_length)


def t5_tokenizer(words: tuple[str, ...] = WORDS, max_length: int = MAX_LENGTH) -> T5Tokenizer:
    """A T5 (unigram) tokenizer that knows `words` whole and spells any other word in letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    pieces += [(letter, -4.0) for letter in ALPHABET]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _clip(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(tokenizer: T5Tokenizer, width: int, layers: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=1,
        block_out_channels=(channels,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_pipeline(
    seed: int = 0,
    *,
    num_layers: int = 3,
    num_heads: int = 4,
    head_dim: int = 16,
    text_width: int = 32,
    text_layers: int = 1,
    vae_channels: int = 8,
    patch_size: int = 2,
    words: tuple[str, ...] = WORDS,
) -> StableDiffusion3Pipeline:
    """A pipeline with random weights; one `seed` gives the same weights always, the global RNG is kept.

    The scheduler's shift is 1: a shift towards noise makes up for resolution, of which 8x8 pixels have none.
    """
    if text_width % 4:
        raise ValueError(f"text_width={text_width} must be a multiple of 4 (two CLIPs, two heads each)")
    tokenizer, tokenizer_3 = clip_tokenizer(words), t5_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=IMAGE_SIZE,
            patch_size=patch_size,
            in_channels=1,
            out_channels=1,
            num_layers=num_layers,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=text_width,
            caption_projection_dim=num_heads * head_dim,
            pooled_projection_dim=text_width,
            pos_embed_max_size=IMAGE_SIZE,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
            vae=_vae(vae_channels),
            text_encoder=_clip(tokenizer, text_width // 2, text_layers),
            tokenizer=tokenizer,
            text_encoder_2=_clip(tokenizer, text_width // 2, text_layers),
            tokenizer_2=clip_tokenizer(words),
            text_encoder_3=_t5(tokenizer_3, text_width, text_layers),
            tokenizer_3=tokenizer_3,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
