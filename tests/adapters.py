"""A tiny pipeline that carries a LoRA, what it draws, and what its run would publish on somebody's machine."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from digits_components import MAX_LENGTH
from peft import LoraConfig
from tiny import build_pipeline

from trl_tafs.hub.facts import CardFacts

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "text_width": 16}
LAYERS = ["attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]
LEVELS = [1.0, 0.75, 0.5, 0.25]
SAMPLING = {"num_inference_steps": 4, "sigmas": LEVELS, "guidance_scale": 1.0, "height": 8, "width": 8}


def with_lora(**settings):
    """A pipeline that carries a LoRA with random A and B, r = 4, and its LoraConfig."""
    config = LoraConfig(**{"r": 4, "target_modules": LAYERS, "init_lora_weights": "gaussian", **settings})
    pipeline = build_pipeline(0, **SIZES)
    pipeline.transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            weight.data.normal_(0, 0.3, generator=generator)
    pipeline.transformer.eval()
    return pipeline, config


def images(pipeline):
    """Four annealed steps at LEVELS, (2, 3, 8, 8), whether the pipeline's own scheduler anneals or not."""
    config = pipeline.scheduler.config
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    return sampled(pipeline)


def sampled(pipeline):
    torch.manual_seed(1)
    prompts = ["a handwritten seven", "the digit two"]
    return pipeline(prompts, max_sequence_length=MAX_LENGTH, output_type="pt", **SAMPLING).images


TOKEN = "hf_" + "abcdefgh" * 4
KEY = "0123456789abcdef" * 2 + "01234567"  # as W&B's
PRIVATE = (TOKEN, KEY, "alicesmith", "/home/", "secret-value", "/data/", "bob@", "gpu-box-17", "swordfish")
SETTINGS = {
    "train_learning_rate": 3e-4,
    "seed": 0,
    "max_sequence_length": 8,
    "logdir": "/home/alicesmith/runs/digits",
    "resume_from": Path("/data/alicesmith/checkpoints/epoch 7"),
    "run_name": "alicesmith_run-3",
    "hub_token": TOKEN,
    "resolution": torch.float32,
    "tracker_kwargs": {
        "wandb": {"entity": "alice", "apiKey": "secret-value", "notes": f"see {TOKEN}, or ask bob@lab.org"},
        "tags": [
            "a",
            f"key {KEY}",
            "out=/home/alicesmith/x/y.txt",
            "https://alicesmith:swordfish@host.org/x",
        ],
    },
    "project_kwargs": {
        "project_dir": "~alicesmith/p",
        "nested": [{"password": "swordfish", "depth": (1, 2)}],
    },
    "negative_prompts": "blurry and/or dark, 1/2 size",
    "docs": "https://huggingface.co/docs/peft",
    "node": "gpu-box-17",
    "comment": "the word was swordfish",
    "accelerator_kwargs": json.dumps({"wandb": {"api_key": "secret-value", "mode": "offline"}}),
    "command": "train --hub_token=secret-value --wandb-password swordfish {'user_name': 'secret-value'}",
}


def on_a_private_machine(patch):
    """A machine with a name, a user and a secret in its environment."""
    patch.setattr("socket.gethostname", lambda: "gpu-box-17")
    patch.setenv("LOGNAME", "alicesmith")
    patch.setenv("MY_API_KEY", "swordfish")


def facts(**settings):
    usual = {
        "pipeline_class": "StableDiffusion3Pipeline",
        "card_tags": ("sd3", "sd3-diffusers"),
        "num_steps": 4,
        "levels_unshifted": LEVELS,
        "levels": [1.0, 0.9, 0.75, 0.5],
        "height": 8,
        "width": 8,
        "max_sequence_length": MAX_LENGTH,
        "base_name": "digits-base",
        "repo_id": "user/digits-lora",
        "prompts": ["a handwritten seven"],
        "training": SETTINGS,
        "rewards": {"legible": 1.0},
        "reward_curve": [(0, 0.2), (1, 0.4)],
        "metrics": {"4 annealed steps": {"before": 0.19, "after": 0.845}},
        "pictures": [("a handwritten seven", "images/before_0.png", "images/after_0.png")],
    }
    return CardFacts(**{**usual, **settings})
