"""The options of the pipeline: image sizes, prompts, and where its models lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.options import Options, check_at_least_1_or_none, check_choice, check_not_empty, option


@dataclass
class PipelineOptions(Options):
    """What is drawn, and how much memory the models take meanwhile."""

    title: ClassVar[str] = "Images and models"

    height: int | None = option(None, "Pixels. None: 512 (paper), or the model's own size where that is smaller.")
    width: int | None = option(None, "Pixels, as height.")
    max_sequence_length: int | None = option(None, "Tokens of a prompt. None: the family's default.")
    negative_prompts: str | None = option("", "Negative prompt, where guidance is on.")
    offload_text_encoders: bool = option(
        False, "Keep text encoders on the CPU except while they encode: 11 GB less for SD3.5's three in bf16."
    )
    model_cpu_offload: bool = option(
        False,
        "Each model is on the GPU only in the phase that uses it, as with diffusers' enable_model_cpu_offload: text "
        "encoders while they encode, the denoiser in rollout and update, the VAE while it decodes and rewards score.",
    )
    vae_tiling: bool = option(False, "The VAE decodes large images in tiles, whose seams are blended.")
    decode_batch_size: int | None = option(None, "Images that the VAE decodes at once. None: sample_batch_size.")
    tiny_decoder: str | None = option(
        None,
        "Folder or Hub name of an AutoencoderTiny (madebyollin/taesd3, taef1) that decodes images only rewards see, in "
        "a fraction of the VAE's time; evaluations and cards keep the VAE. None: the VAE decodes all.",
    )
    tiny_decoder_steps: str = option(
        "intermediate", "Which scored steps it decodes: intermediate, all but the last scored one; or all."
    )
    prompt_cache_dir: str | None = option(
        None,
        "Folder for encoded prompts. A list or dataset of prompts is encoded before training, and what is found there "
        "needs no text encoder: a pipeline loaded with text_encoder=None (and _2, ...) will do.",
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_at_least_1_or_none(self, "height", "width", "max_sequence_length", "decode_batch_size")
        check_not_empty(self, "prompt_cache_dir", "tiny_decoder")
        check_choice(self, "tiny_decoder_steps", ("intermediate", "all"))
        if self.tiny_decoder is None and self.tiny_decoder_steps != "intermediate":
            raise ValueError(
                f"tiny_decoder_steps={self.tiny_decoder_steps!r} has no effect without tiny_decoder; name one, or "
                "leave it out"
            )
