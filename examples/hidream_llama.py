r"""HiDream-I1 with the Llama that its repositories come without, for the command line.

    trl-tafs train --config examples/configs/hidream_80gb.yaml
    trl-tafs sample none --pretrained_model HiDream-ai/HiDream-I1-Full --prompt "a fox" --output fox.png \
        --pipeline_class examples/hidream_llama.py:HiDreamWithLlama --height 1024 --width 1024

Llama is read from the repository or folder in the environment variable HIDREAM_LLAMA, by default Meta's own, which is
gated: accept its licence on the Hub.
"""

from __future__ import annotations

import os
from typing import Any, Self

from transformers import AutoTokenizer, LlamaForCausalLM

from trl_tafs import TAFSHiDreamPipeline

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


class HiDreamWithLlama(TAFSHiDreamPipeline):
    """`TAFSHiDreamPipeline` that brings its fourth text encoder along."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> Self:
        """Load the pipeline, and beside it Llama in the same dtype, unless it is given."""
        source = os.environ.get("HIDREAM_LLAMA", LLAMA)
        if "text_encoder_4" not in options:
            dtype = options.get("dtype")
            dtype = dtype.get("default") if isinstance(dtype, dict) else dtype
            llama = LlamaForCausalLM.from_pretrained(source, dtype=dtype, output_hidden_states=True)
            options |= {"text_encoder_4": llama, "tokenizer_4": AutoTokenizer.from_pretrained(source)}
        return super().from_pretrained(pretrained_model_name_or_path, **options)
