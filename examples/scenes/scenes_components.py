"""A complete Stable Diffusion 3 pipeline of five million weights that draws scenes, of the words pipeline's parts."""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "words"))

from scenes_data import COLOURS, COUNTS, KINDS, PATCH, PLURALS, SIDE
from words_components import assemble

MAX_LENGTH = 10  # tokens of a caption, for CLIP and for T5: pass max_sequence_length=MAX_LENGTH to the pipeline
WORDS = (
    "a",
    "an",
    "and",
    "left",
    "right",
    "of",
    "above",
    "below",
    *COUNTS.values(),
    *COLOURS,
    *KINDS,
    *PLURALS.values(),
)
# Of the noise levels: what a scene shows is decided above s = .85, for the hundreds of values of an icon tell the same.
SHIFT = 5.0
FOLDER = Path(__file__).with_name("pipeline")


def load(pipeline_class: type = StableDiffusion3Pipeline, folder: Path = FOLDER) -> StableDiffusion3Pipeline:
    """The trained pipeline; it is kept in half precision and computes in float32.

    Raises:
        FileNotFoundError: it has not been pre-trained.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline; make it first: python examples/scenes/scenes_pretrain.py")
    pipeline = pipeline_class.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_pipeline(
    seed: int = 0,
    *,
    num_layers: int = 3,
    num_heads: int = 7,
    head_dim: int = 32,
    text_width: int = 128,
    text_layers: int = 2,
    vae_channels: int = 8,
) -> StableDiffusion3Pipeline:
    """A pipeline with random weights; one `seed` gives the same weights always, the global RNG is kept."""
    return assemble(
        SIDE,
        PATCH,
        num_layers,
        num_heads,
        head_dim,
        text_width,
        vae_channels,
        WORDS,
        MAX_LENGTH,
        seed,
        text_layers,
        SHIFT,
    )
