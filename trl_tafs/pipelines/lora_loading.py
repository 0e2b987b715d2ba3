"""LoRA on a pipeline, for families whose stock pipeline has no `load_lora_weights` of its own."""

from __future__ import annotations

from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor


class LoraLoading(LoraBaseMixin):
    """What diffusers' LoRA mixins do, by the denoiser's own `load_lora_adapter`, which stock users call directly."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> None:
        """Load a LoRA in diffusers' format: a repository, a folder, or a state dict with `transformer.` keys."""
        options = {"prefix": "transformer", "use_safetensors": True} | options
        self.transformer.load_lora_adapter(source, adapter_name=adapter_name, **options)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: Any,
        transformer_lora_layers: dict[str, Tensor],
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write a LoRA and its configuration in diffusers' format, as the stock mixins do."""
        cls._save_lora_weights(
            save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            weight_name=weight_name,
        )
