"""A tiny pipeline of every family, built in memory from configs: diffusers' and transformers' own classes, only small.

Each builder returns the stock pipeline. The tokenizers know a few words whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
)
from digits_components import build_pipeline as build_digits
from digits_components import clip_tokenizer, t5_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import trl_tafs

WIDTH = 16
LENGTH = 8  # tokens of a prompt, for the encoders that pad
WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "two", "seven", "handwritten")
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endif %} {% endfor %}"
)


def word_tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    """Words by whitespace, with a chat template that says them alone; `begins`: after a token of the beginning."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "<end>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 2)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "bos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, model_max_length=1024, **special)


def language_model(config_class: type, model_class: type, layers: int = 2, **changes):
    """A decoder-only text encoder."""
    config = {
        "vocab_size": 32,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
    }
    return model_class(config_class(**(config | changes))).eval()


def clip(model_class: type, tokenizer):
    """CLIP's text encoder."""
    return model_class(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def t5(tokenizer) -> T5EncoderModel:
    """T5's encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 2,
            d_ff=WIDTH,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def kl_vae(vae_class: type = AutoencoderKL, channels: int = 4, levels: int = 2, **changes):
    """A VAE with a factor of 2, or of 2^(levels - 1)."""
    return vae_class(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **changes,
    )


SCALES = {"scaling_factor": 0.36, "shift_factor": 0.11}


def sd3():
    """Stable Diffusion 3."""
    pipe = build_digits(0, num_layers=2, text_width=16)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


def flux(guidance_embeds: bool = True, dynamic: bool = True):
    """FLUX.1-dev; schnell without both."""
    tokenizer, tokenizer_2 = clip_tokenizer(WORDS), t5_tokenizer(WORDS)
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, base_image_seq_len=4),
        vae=kl_vae(**SCALES),
        text_encoder=clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def flux_kontext():
    """FLUX.1-Kontext."""
    return diffusers.FluxKontextPipeline(**flux().components)


def dc_vae():
    """Sana's deep-compression VAE, with a factor of 8."""
    blocks = {"attention_head_dim": 2, "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
        **blocks,
    )


def sana_transformer(**changes):
    """Sana's denoiser."""
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        **changes,
    )


def sana(scheduler=None):
    """Sana 1.5, with a learned sigma."""
    return diffusers.SanaPipeline(
        word_tokenizer(),
        language_model(Gemma2Config, Gemma2Model),
        dc_vae(),
        sana_transformer(out_channels=8, timestep_scale=0.5, qk_norm="rms_norm_across_heads"),
        scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana_sprint():
    """SanaSprint."""
    return diffusers.SanaSprintPipeline(
        word_tokenizer(),
        language_model(Gemma2Config, Gemma2Model),
        dc_vae(),
        sana_transformer(out_channels=4, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        SCMScheduler(),
    )


def qwen_image():
    """Qwen-Image."""
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_shift=0.9, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, -0.2, 0.9],
            latents_std=[2.8, 1.4, 2.3, 1.2],
        ),
        text_encoder=language_model(Qwen2Config, Qwen2ForCausalLM),
        tokenizer=word_tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def _flux2_transformer(**changes):
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        **changes,
    )


def _flux2_vae():
    vae = kl_vae(AutoencoderKLFlux2)
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    return vae.eval()


def flux2():
    """FLUX.2-dev."""
    return diffusers.Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=language_model(MistralConfig, MistralForCausalLM, layers=30),
        tokenizer=word_tokenizer(),
        transformer=_flux2_transformer(guidance_embeds=True),
    )


def flux2_klein(is_distilled: bool = False):
    """FLUX.2-klein, the base model."""
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=language_model(Qwen3Config, Qwen3ForCausalLM, layers=27),
        tokenizer=word_tokenizer(),
        transformer=_flux2_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    )


def z_image():
    """Z-Image."""
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(**SCALES),
        text_encoder=language_model(Qwen3Config, Qwen3Model),
        tokenizer=word_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[2, 2, 4],
            axes_lens=[64, 32, 32],
        ),
    )


def hidream():
    """HiDream-I1."""
    tokenizer, tokenizer_3 = clip_tokenizer(WORDS), t5_tokenizer(WORDS)
    return diffusers.HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(**SCALES),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=clip_tokenizer(WORDS),
        text_encoder_3=t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
        text_encoder_4=language_model(LlamaConfig, LlamaForCausalLM, attn_implementation="eager"),
        tokenizer_4=word_tokenizer(),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=2 * WIDTH,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
        ),
    )


def lumina2():
    """Lumina-Image 2.0, whose pipeline takes any VAE's factor for 8."""
    return diffusers.Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4),
        vae=kl_vae(levels=4, **SCALES),
        text_encoder=language_model(Gemma2Config, Gemma2Model),
        tokenizer=word_tokenizer(),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(64, 16, 16),
            cap_feat_dim=WIDTH,
        ),
    )


def chroma():
    """Chroma."""
    tokenizer = t5_tokenizer(WORDS)
    return diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4),
        vae=kl_vae(**SCALES),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    )


def cogview4(dynamic: bool = True):
    """CogView4; with the scheduler of the repositories, or one whose shift is fixed."""
    scheduler = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    scheduler["base_image_seq_len"] = 4
    return diffusers.CogView4Pipeline(
        tokenizer=word_tokenizer(begins=True),
        text_encoder=language_model(GlmConfig, GlmModel),
        vae=kl_vae(scaling_factor=0.36),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler if dynamic else {"shift": 3.0})),
    )


def aura_flow():
    """AuraFlow."""
    tokenizer = t5_tokenizer(WORDS)
    encoder = UMT5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    for name, parameter in transformer.named_parameters():
        if ".norm" in name:  # gates that are nearly shut would hide a LoRA
            parameter.data.mul_(20)
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder).eval(),
        vae=kl_vae(scaling_factor=0.36),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def ovis_image():
    """Ovis-Image."""
    return diffusers.OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4),
        vae=kl_vae(**SCALES),
        text_encoder=language_model(Qwen3Config, Qwen3Model),
        tokenizer=word_tokenizer(),
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def longcat_image():
    """LongCat-Image; its stock pipeline draws 16 channels, and its text processor only rewrites prompts."""
    return diffusers.LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4),
        vae=kl_vae(channels=16, **SCALES),
        text_encoder=language_model(Qwen2Config, Qwen2ForCausalLM),
        tokenizer=word_tokenizer(),
        text_processor=word_tokenizer(),
        transformer=diffusers.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[2, 2, 4],
        ),
    )


@dataclass(frozen=True)
class Family:
    """A family as the tests see it."""

    pipeline: str  # our class
    build: Callable
    size: int = 16  # pixels
    wide: tuple[int, int] = (16, 32)
    guidance: float | None = 3.5  # None: the stock pipeline has no classifier-free guidance
    tolerance: float = 0.0  # of the parity with the stock pipeline
    has_ode: bool = True  # the stock pipeline can solve the ODE
    options: dict = field(default_factory=dict)  # of the builder
    attributes: dict = field(default_factory=dict)  # of the pipeline, which its components don't say


FAMILIES = {
    "sd3": Family("TAFSStableDiffusion3Pipeline", sd3, size=8, wide=(8, 16)),
    "flux-dev": Family("TAFSFluxPipeline", flux),
    "flux-schnell": Family("TAFSFluxPipeline", flux, options={"guidance_embeds": False, "dynamic": False}),
    "flux-kontext": Family("TAFSFluxKontextPipeline", flux_kontext),
    "sana": Family("TAFSSanaPipeline", sana, size=32, wide=(32, 64)),
    "sana-sprint": Family(
        "TAFSSanaSprintPipeline",
        sana_sprint,
        size=32,
        wide=(32, 64),
        guidance=None,
        tolerance=1e-5,
        has_ode=False,
    ),
    "qwen-image": Family("TAFSQwenImagePipeline", qwen_image),
    "flux2": Family("TAFSFlux2Pipeline", flux2, guidance=None),
    "flux2-klein": Family("TAFSFlux2KleinPipeline", flux2_klein),
    "flux2-klein-distilled": Family(
        "TAFSFlux2KleinPipeline", flux2_klein, guidance=None, options={"is_distilled": True}
    ),
    "z-image": Family("TAFSZImagePipeline", z_image),
    # it draws at its own area alone
    "hidream": Family(
        "TAFSHiDreamPipeline", hidream, wide=(8, 32), tolerance=1e-5, attributes={"default_sample_size": 8}
    ),
    "lumina2": Family("TAFSLumina2Pipeline", lumina2, size=32, wide=(16, 32), attributes={"system_prompt": ""}),
    "chroma": Family("TAFSChromaPipeline", chroma),
    "cogview4": Family("TAFSCogView4Pipeline", cogview4),
    "cogview4-static": Family("TAFSCogView4Pipeline", cogview4, options={"dynamic": False}),
    "aura-flow": Family("TAFSAuraFlowPipeline", aura_flow),
    "ovis-image": Family("TAFSOvisImagePipeline", ovis_image),
    "longcat-image": Family("TAFSLongCatImagePipeline", longcat_image, attributes={"tokenizer_max_length": LENGTH}),
}


EDITORS = {"TAFSQwenImageEditPipeline", "TAFSQwenImageEditPlusPipeline"}  # which draw nothing without a source picture


def stock(name: str, seed: int = 0):
    """The stock pipeline, with weights that say something: zero-initialised layers would hide what isn't passed on."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = family.build(**family.options)
        for module in (pipe.transformer, pipe.vae):
            module.eval().requires_grad_(False)
        for parameter in pipe.transformer.parameters():
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    for attribute, value in family.attributes.items():
        setattr(pipe, attribute, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipe, name: str):
    """Our pipeline over the stock one's components, the very same modules."""
    mine = trl_tafs.AutoTAFSPipeline.from_pipe(pipe)
    for attribute in FAMILIES[name].attributes:
        setattr(mine, attribute, getattr(pipe, attribute))
    assert type(mine) is getattr(trl_tafs, FAMILIES[name].pipeline)
    return mine
