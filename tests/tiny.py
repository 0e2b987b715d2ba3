"""Tiny real components, made from configs, for all tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "digits"))

from digits_components import build_pipeline  # noqa: E402

from trl_tafs import TAFSGRPOConfig, TAFSGRPOTrainer, TAFSStableDiffusion3Pipeline  # noqa: E402

__all__ = ["ROOT", "build_pipeline", "brightness", "config", "load", "trainer"]


def load(folder):
    """`TAFSStableDiffusion3Pipeline.from_pretrained`, without progress bars."""
    pipeline = TAFSStableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def brightness(images, prompts, metadata):
    """A reward that a small policy can learn: the mean pixel."""
    return images.mean(dim=(1, 2, 3)), {}


def config(folder, **changes):
    """Two groups of 8 images in batches of 8, one optimizer step an epoch, everything in `folder`."""
    settings = {
        "objective": "clipped",
        "seed": 1,
        "project_kwargs": {"project_dir": str(folder)},
        "mixed_precision": "no",
        "sample_batch_size": 8,
        "sample_num_batches_per_epoch": 2,
        "num_generations": 8,
        "num_epochs": 2,
        "train_batch_size": 8,
        "lora_rank": 4,
        "lora_alpha": 8,
        "disable_tqdm": True,
        "reward_retry_delay": 0.0,
        "sample_grid_freq": 0,
        "picture_freq": 0,
        "save_freq": 1,
    }
    if changes.get("full_finetuning"):
        settings = {name: value for name, value in settings.items() if not name.startswith("lora_")}
    return TAFSGRPOConfig(**(settings | changes))


def prompts():
    """A prompt function as DDPOTrainer's."""
    return "a handwritten seven", {"digit": 7}


def trainer(pipeline, folder, reward=brightness, prompt_function=prompts, hook=None, peft_config=None, **changes):
    """A trainer on `pipeline`; keywords beyond the constructor's go to the config."""
    keywords = {k: changes.pop(k) for k in ("eval_prompts", "eval_reward_function") if k in changes}
    settings = config(folder, **changes)
    return TAFSGRPOTrainer(settings, reward, prompt_function, pipeline, hook, peft_config=peft_config, **keywords)
