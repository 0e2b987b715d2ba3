"""Architectures of the models that the recipes are for, so that their memory is planned without the Hub.

Only sizes are here: what the models' own `config.json` say beyond the defaults of diffusers' and transformers' classes.
`write` puts them into a folder that `trl-tafs plan --pretrained_model FOLDER` reads. A test compares the number of the
denoiser's weights with the one that each model's name or card gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
FLOW = (DIFFUSERS, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
FLOW_DYNAMIC = (DIFFUSERS, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})

# Autoencoders
_KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 1024,
}
VAE_16 = (
    DIFFUSERS,
    "AutoencoderKL",
    _KL
    | {"latent_channels": 16, "use_quant_conv": False}
    | {"use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159},
)
VAE_SDXL = (DIFFUSERS, "AutoencoderKL", _KL | {"scaling_factor": 0.13025})
VAE_FLUX2 = (DIFFUSERS, "AutoencoderKLFlux2", {})
VAE_QWEN = (DIFFUSERS, "AutoencoderKLQwenImage", {})
_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
VAE_SANA = (
    DIFFUSERS,
    "AutoencoderDC",
    {
        "encoder_block_types": _DC_BLOCKS,
        "decoder_block_types": _DC_BLOCKS,
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
)

# Text encoders
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
CLIP_L = (TRANSFORMERS, "CLIPTextModelWithProjection", {"model_type": "clip_text_model"} | _CLIP_L)
CLIP_L_PLAIN = (TRANSFORMERS, "CLIPTextModel", {"model_type": "clip_text_model"} | _CLIP_L)
CLIP_G = (TRANSFORMERS, "CLIPTextModelWithProjection", {"model_type": "clip_text_model"} | _CLIP_G)
T5_XXL = (
    TRANSFORMERS,
    "T5EncoderModel",
    {"model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    | {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "is_encoder_decoder": False},
)
PILE_T5_XL = (
    TRANSFORMERS,
    "UMT5EncoderModel",
    {"model_type": "umt5", "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    | {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "is_encoder_decoder": False},
)
GEMMA_2 = (
    TRANSFORMERS,
    "Gemma2Model",
    {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
)
_QWEN_3_4B = {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
_QWEN_3_4B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
_QWEN_3_4B |= {"tie_word_embeddings": True}
QWEN_3_4B = (TRANSFORMERS, "Qwen3ForCausalLM", _QWEN_3_4B)
QWEN_3_4B_PLAIN = (TRANSFORMERS, "Qwen3Model", _QWEN_3_4B)
OVIS_2B = (
    TRANSFORMERS,
    "Qwen3Model",
    {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
)
QWEN_VL_7B = (
    TRANSFORMERS,
    "Qwen2_5_VLForConditionalGeneration",
    {
        "model_type": "qwen2_5_vl",
        "text_config": {"model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        | {"out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
)
MISTRAL_24B = (
    TRANSFORMERS,
    "Mistral3ForConditionalGeneration",
    {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "head_dim": 128}
        | {"num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072},
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096}
        | {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 1540, "patch_size": 14},
        "tie_word_embeddings": False,
    },
)
LLAMA_8B = (
    TRANSFORMERS,
    "LlamaForCausalLM",
    {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
)
GLM_4_9B = (
    TRANSFORMERS,
    "GlmModel",
    {"model_type": "glm", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40}
    | {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552},
)

# Denoisers
_SD35 = {"sample_size": 128, "joint_attention_dim": 4096, "qk_norm": "rms_norm"}
SD35_MEDIUM = (
    DIFFUSERS,
    "SD3Transformer2DModel",
    _SD35
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    | {"dual_attention_layers": list(range(13))},
)
SD35_LARGE = (
    DIFFUSERS,
    "SD3Transformer2DModel",
    _SD35 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
)
KLEIN_4B = (
    DIFFUSERS,
    "Flux2Transformer2DModel",
    {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    | {"guidance_embeds": False},
)
HIDREAM = (
    DIFFUSERS,
    "HiDreamImageTransformer2DModel",
    {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096]}
    | {"axes_dims_rope": [64, 32, 32], "max_resolution": [128, 128], "llama_layers": [*range(32), *([31] * 16)]},
)
SANA_15 = (DIFFUSERS, "SanaTransformer2DModel", {"qk_norm": "rms_norm_across_heads"})
SANA_SPRINT = (
    DIFFUSERS,
    "SanaTransformer2DModel",
    {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True, "timestep_scale": 1000.0},
)
COGVIEW4 = (
    DIFFUSERS,
    "CogView4Transformer2DModel",
    {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
)
LONGCAT = (DIFFUSERS, "LongCatImageTransformer2DModel", {"num_layers": 10, "num_single_layers": 20})
LUMINA2 = (DIFFUSERS, "Lumina2Transformer2DModel", {"cap_feat_dim": 2304})

SD3_TEXT = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
MODELS: dict[str, dict[str, Any]] = {  # repository: its pipeline's class, and its parts
    "stabilityai/stable-diffusion-3.5-medium": {
        "class": "StableDiffusion3Pipeline",
        "billions": 2.5,
        "parts": SD3_TEXT | {"transformer": SD35_MEDIUM, "vae": VAE_16, "scheduler": FLOW},
    },
    "stabilityai/stable-diffusion-3.5-large": {
        "class": "StableDiffusion3Pipeline",
        "billions": 8.1,
        "parts": SD3_TEXT | {"transformer": SD35_LARGE, "vae": VAE_16, "scheduler": FLOW},
    },
    "black-forest-labs/FLUX.1-dev": {
        "class": "FluxPipeline",
        "billions": 12,
        "parts": {
            "text_encoder": CLIP_L_PLAIN,
            "text_encoder_2": T5_XXL,
            "transformer": (DIFFUSERS, "FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": VAE_16,
            "scheduler": FLOW_DYNAMIC,
        },
    },
    "black-forest-labs/FLUX.2-dev": {
        "class": "Flux2Pipeline",
        "billions": 32,
        "parts": {
            "text_encoder": MISTRAL_24B,
            "transformer": (DIFFUSERS, "Flux2Transformer2DModel", {}),
            "vae": VAE_FLUX2,
            "scheduler": FLOW_DYNAMIC,
        },
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {
        "class": "Flux2KleinPipeline",
        "billions": 4,
        "values": {"is_distilled": False},
        "parts": {
            "text_encoder": QWEN_3_4B,
            "transformer": KLEIN_4B,
            "vae": VAE_FLUX2,
            "scheduler": FLOW_DYNAMIC,
        },
    },
    "Qwen/Qwen-Image": {
        "class": "QwenImagePipeline",
        "billions": 20,
        "parts": {
            "text_encoder": QWEN_VL_7B,
            "transformer": (DIFFUSERS, "QwenImageTransformer2DModel", {}),
            "vae": VAE_QWEN,
            "scheduler": FLOW_DYNAMIC,
        },
    },
    "Tongyi-MAI/Z-Image": {
        "class": "ZImagePipeline",
        "billions": 6,
        "parts": {
            "text_encoder": QWEN_3_4B_PLAIN,
            "transformer": (DIFFUSERS, "ZImageTransformer2DModel", {}),
            "vae": VAE_16,
            "scheduler": FLOW,
        },
    },
    "HiDream-ai/HiDream-I1-Full": {
        "class": "HiDreamImagePipeline",
        "billions": 17,
        "parts": {
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
            "text_encoder_4": LLAMA_8B,
            "transformer": HIDREAM,
            "vae": VAE_16,
            "scheduler": FLOW,
        },
    },
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": {
        "class": "SanaPipeline",
        "billions": 1.6,
        "parts": {"text_encoder": GEMMA_2, "transformer": SANA_15, "vae": VAE_SANA, "scheduler": FLOW},
    },
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": {
        "class": "SanaSprintPipeline",
        "billions": 1.6,
        "parts": {
            "text_encoder": GEMMA_2,
            "transformer": SANA_SPRINT,
            "vae": VAE_SANA,
            "scheduler": (DIFFUSERS, "SCMScheduler", {}),
        },
    },
    "Alpha-VLLM/Lumina-Image-2.0": {
        "class": "Lumina2Pipeline",
        "billions": 2.6,
        "parts": {"text_encoder": GEMMA_2, "transformer": LUMINA2, "vae": VAE_16, "scheduler": FLOW_DYNAMIC},
    },
    "lodestones/Chroma1-HD": {
        "class": "ChromaPipeline",
        "billions": 8.9,
        "parts": {
            "text_encoder": T5_XXL,
            "transformer": (DIFFUSERS, "ChromaTransformer2DModel", {}),
            "vae": VAE_16,
            "scheduler": FLOW,
        },
    },
    "zai-org/CogView4-6B": {
        "class": "CogView4Pipeline",
        "billions": 6,
        "parts": {"text_encoder": GLM_4_9B, "transformer": COGVIEW4, "vae": VAE_16, "scheduler": FLOW_DYNAMIC},
    },
    "fal/AuraFlow-v0.3": {
        "class": "AuraFlowPipeline",
        "billions": 6.8,
        "parts": {
            "text_encoder": PILE_T5_XL,
            "transformer": (DIFFUSERS, "AuraFlowTransformer2DModel", {}),
            "vae": VAE_SDXL,
            "scheduler": FLOW,
        },
    },
    "AIDC-AI/Ovis-Image-7B": {
        "class": "OvisImagePipeline",
        "billions": 7,
        "parts": {
            "text_encoder": OVIS_2B,
            "transformer": (DIFFUSERS, "OvisImageTransformer2DModel", {}),
            "vae": VAE_16,
            "scheduler": FLOW_DYNAMIC,
        },
    },
    "meituan-longcat/LongCat-Image": {
        "class": "LongCatImagePipeline",
        "billions": 6,
        "values": {"text_processor": [TRANSFORMERS, "Qwen2VLProcessor"]},
        "parts": {"text_encoder": QWEN_VL_7B, "transformer": LONGCAT, "vae": VAE_16, "scheduler": FLOW_DYNAMIC},
    },
}


def write(name: str, folder: Path) -> Path:
    """Write the configurations of a model into a folder as diffusers lays them out, without weights; return it."""
    model = MODELS[name]
    index = {"_class_name": model["class"], **model.get("values", {})}
    for part, (library, kind, values) in model["parts"].items():
        index[part] = [library, kind]
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        known = values if library == TRANSFORMERS else {"_class_name": kind} | values
        file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder
