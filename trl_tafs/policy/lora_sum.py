"""PEFT's layers with fewer operations, to the bit: a product scaled and added by one, inputs that autocast casts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor


class ScaledSum(LoraVariant):
    """`y + alpha B A x` by one operation where PEFT has two: a sixth of those that a LoRA adds to an evaluation.

    A kernel that adds scaled operands rounds once. Where alpha is a power of 2, the product with it is exact, and the
    sum is PEFT's to the bit. Merging and unmerging are PEFT's own.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **options: Any) -> None:
        """It has no weights of its own."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """X (..., in), result (..., out) of the base layer and the adapters before: (..., out)."""
        product = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result.add(product, alpha=module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base's weight with the adapter in it."""
        delta = module.get_delta_weight(active_adapter)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Put the adapter into the base's weight."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base's weight without the adapter."""
        delta = module.get_delta_weight(active_adapter)
        return orig_weight - delta.to(orig_weight.dtype)


def add_in_one(layers: Sequence[Any]) -> None:
    """Let adapters be added so in those of PEFT's layers where it is the same: linear ones, plain LoRA, alpha 2^k."""
    for layer in (layer for layer in layers if isinstance(layer, Linear)):
        for name, scale in layer.scaling.items():
            if name not in layer.lora_variant and math.frexp(scale)[0] == 0.5:
                layer.lora_variant[name] = ScaledSum()


def prepare_layers(layers: Sequence[Any], mixed_precision: str) -> None:
    """Let PEFT's layers add adapters by one operation, and leave their inputs to autocast where that casts them.

    Theirs would be a way to float32 and back. Without autocast they cast, to the dtype of their weights.
    """
    add_in_one(layers)
    for layer in layers:
        layer.cast_input_dtype_enabled = mixed_precision == "no"
