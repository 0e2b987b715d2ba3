"""The trained LoRA: attach it, switch it off, list its parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trl_tafs.method.noise import noise_seed
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.quantized import is_quantized
from trl_tafs.policy.adapter_file import check_adapter_fits, lora_metadata, read_adapter
from trl_tafs.policy.carried import TrainedAdapter, activate, adapter_layers, carried_config, choose_adapter
from trl_tafs.policy.options import PolicyOptions

if TYPE_CHECKING:
    from peft import LoraConfig


def free_denoiser(pipeline: TAFSPipelineMixin, lora_config: Any | None) -> None:
    """Train the whole denoiser, in float32, instead of a LoRA on it."""
    denoiser = pipeline.denoiser
    if lora_config is not None or getattr(denoiser, "peft_config", None):
        raise ValueError("full_finetuning trains no LoRA; leave out the LoraConfig, and fuse or unload adapters")
    if is_quantized(denoiser):
        raise ValueError("full_finetuning can't train a quantized denoiser; load it without a quantization_config")
    denoiser.float().requires_grad_(True)


def attach_lora(
    pipeline: TAFSPipelineMixin, config: PolicyOptions, lora_config: Any | None
) -> tuple[TrainedAdapter, LoraConfig]:
    """Put the trained LoRA on the denoiser; returns which one it is and its `LoraConfig`, a copy of the user's.

    It is one that the pipeline came with (`choose_adapter`), `config.adapter_name_or_path`, the user's `lora_config`,
    or a new one of `lora_rank` on the family's default modules. Others that are active act beneath it, frozen.
    """
    denoiser = pipeline.denoiser
    chosen = choose_adapter(denoiser, config, lora_config)
    if chosen.is_new:
        lora_config = _add_lora(pipeline, config, lora_config, chosen.name)
    else:
        lora_config = carried_config(denoiser, chosen.name)
        _check_dropout(lora_config)
    lora_metadata(lora_config)  # refuses what diffusers' format can't hold, while nothing is trained yet
    denoiser.eval()
    denoiser.requires_grad_(False)
    activate(adapter_layers(denoiser), (*chosen.beneath, chosen.name), chosen.name)
    for parameter in trainable_parameters(denoiser):
        parameter.data = parameter.data.float()
    return chosen, lora_config


def default_lora_config(pipeline: TAFSPipelineMixin, config: PolicyOptions) -> LoraConfig:
    """Return the `LoraConfig` of the options, on the family's default modules unless they name others."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_target_modules or pipeline.lora_target_modules),
        exclude_modules=None if config.lora_target_modules else pipeline.lora_excluded_modules or None,
    )


def _add_lora(pipeline: TAFSPipelineMixin, config: PolicyOptions, lora_config: Any | None, name: str) -> LoraConfig:
    from peft import set_peft_model_state_dict

    denoiser, weights = pipeline.denoiser, None
    if config.adapter_name_or_path:
        if lora_config is not None:
            raise ValueError("give either a LoraConfig or adapter_name_or_path, whose own configuration is used")
        weights, lora_config = read_adapter(config.adapter_name_or_path, denoiser=pipeline.denoiser_name)
        check_adapter_fits(weights, denoiser, lora_config)
    elif lora_config is None:
        lora_config = default_lora_config(pipeline, config)
    else:
        lora_config = copy.deepcopy(lora_config)  # PEFT writes into it
    _check_dropout(lora_config)
    try:
        with seeded(config.seed, "lora"):
            denoiser.add_adapter(lora_config, name)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"the LoRA can't be attached to {type(denoiser).__name__}: {error} Its linear layers end in: "
            f"{', '.join(names)}"
        ) from error
    if weights is not None:
        set_peft_model_state_dict(denoiser, weights, adapter_name=name)
    return lora_config


@contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Inside, torch's global generator is that of a part's first weights: the same on every process."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(noise_seed(seed, part))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _check_dropout(lora_config: Any) -> None:
    if getattr(lora_config, "lora_dropout", 0.0):
        raise ValueError(
            f"lora_dropout is {lora_config.lora_dropout}: rollout and training must be the same policy, or the ratio "
            "isn't 1 on policy; use lora_dropout=0.0"
        )


@contextmanager
def without_trained(layers: Sequence[Any], adapter: TrainedAdapter) -> Iterator[None]:
    """Inside, the denoiser is the base policy with what is frozen: the reference of the KL, at no memory of its own.

    `layers` are all that PEFT has in the denoiser (`adapter_layers`): a walk over its modules, thousands of them, would
    cost more than the switch.
    """
    if adapter.beneath:
        activate(layers, adapter.beneath)
    else:
        switch(layers, on=False)
    try:
        yield
    finally:
        if adapter.beneath:
            activate(layers, (*adapter.beneath, adapter.name), adapter.name)
        else:
            switch(layers, on=True)


def switch(layers: Sequence[Any], *, on: bool) -> None:
    """Switch the active adapters of these layers on or off."""
    for layer in layers:
        layer.enable_adapters(on)


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters, in order."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def adapter_state_dict(denoiser: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the LoRA's weights as PEFT names them, copied to the CPU."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    return {key: value.detach().cpu().clone() for key, value in state.items()}
