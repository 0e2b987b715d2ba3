"""Whether a module's weights are quantized, and by what."""

from __future__ import annotations

from torch import nn


def is_quantized(module: nn.Module) -> bool:
    """Return whether diffusers or transformers loaded it with a `quantization_config`."""
    return getattr(module, "hf_quantizer", None) is not None or bool(getattr(module, "is_quantized", False))


def is_bitsandbytes(module: nn.Module) -> bool:
    """Return whether its weights are bitsandbytes', which stay where they were loaded."""
    return bool(getattr(module, "is_loaded_in_4bit", False) or getattr(module, "is_loaded_in_8bit", False))
