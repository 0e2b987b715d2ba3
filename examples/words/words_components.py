"""A complete Stable Diffusion 3 pipeline of two million weights that writes words, built in memory from configs alone.

Every class is diffusers' or transformers' own, only small: a one-block VAE whose latents have the images' size (three
channels), two CLIP text encoders, a T5 encoder and a flow-matching scheduler. Tokenizers spell words letter by letter.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from words_data import COLOURS, LAYOUTS, LETTERS

MAX_LENGTH = 8  # tokens of a prompt, for CLIP and for T5: pass max_sequence_length=MAX_LENGTH to the pipeline
WHOLE_WORDS = ("in", *COLOURS)


def pipeline_folder(size: str) -> Path:
    """Where words_pretrain.py puts the trained one."""
    return Path(__file__).with_name(f"pipeline_{size}")


def load(size: str, pipeline_class: type = StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """The trained pipeline; it is kept in half precision and computes in float32."""
    pipeline = pipeline_class.from_pretrained(pipeline_folder(size), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_tokenizer(whole: Sequence[str] = WHOLE_WORDS, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Words that are one token each; others are spelled in letters, but for endings that such a word has (ag-ed)."""
    merges, pieces = [], []
    for word in whole:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the end: only a word's ending can be merged
            merges.append((parts[-2], parts[-1]))
            parts[-2:] = ["".join(merges[-1])]
            pieces.append(parts[-1])
    pieces = ["<|startoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS), *dict.fromkeys(pieces)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=max_length)


def t5_tokenizer(whole: Sequence[str] = WHOLE_WORDS, max_length: int = MAX_LENGTH) -> T5Tokenizer:
    """The same pieces by a unigram model."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in whole]
    pieces += [(letter, -4.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _clip(tokenizer: CLIPTokenizer, width: int, layers: int = 1) -> CLIPTextModelWithProjection:
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


def _t5(tokenizer: T5Tokenizer, width: int, layers: int = 1) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=2,
            relative_attention_num_buckets=16,
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
        latent_channels=3,
        block_out_channels=(channels,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_pipeline(
    size: str = "small",
    seed: int = 0,
    *,
    num_layers: int = 3,
    num_heads: int = 4,
    head_dim: int = 32,
    text_width: int = 64,
    vae_channels: int = 8,
) -> StableDiffusion3Pipeline:
    """A pipeline with random weights; one `seed` gives the same weights always, the global RNG is kept."""
    layout, widths = LAYOUTS[size], (num_heads, head_dim, text_width, vae_channels)
    return assemble(layout.width, layout.patch, num_layers, *widths, WHOLE_WORDS, MAX_LENGTH, seed)


def assemble(
    side: int,
    patch: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    text_width: int,
    vae_channels: int,
    words: Sequence[str],
    max_length: int,
    seed: int,
    text_layers: int = 1,
    shift: float = 1.0,
) -> StableDiffusion3Pipeline:
    """A pipeline with random weights; `side` is the longer side of its images, `max_length` the tokens of a caption.

    Diffusers gives the transformer CLIP's last state but one: with one of `text_layers`, tokens that know no other.
    `shift` is the scheduler's, of the noise levels.
    """
    tokenizer, tokenizer_3 = clip_tokenizer(words, max_length), t5_tokenizer(words, max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=side,
            patch_size=patch,
            in_channels=3,
            out_channels=3,
            num_layers=num_layers,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=text_width,
            caption_projection_dim=num_heads * head_dim,
            pooled_projection_dim=text_width,
            pos_embed_max_size=side // patch,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
            vae=_vae(vae_channels),
            text_encoder=_clip(tokenizer, text_width // 2, text_layers),
            tokenizer=tokenizer,
            text_encoder_2=_clip(tokenizer, text_width // 2, text_layers),
            tokenizer_2=clip_tokenizer(words, max_length),
            text_encoder_3=_t5(tokenizer_3, text_width, text_layers),
            tokenizer_3=tokenizer_3,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
