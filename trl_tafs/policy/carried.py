"""What a pipeline carries when a trainer is given it: carried on, or refused before anything is moved.

A pipeline need not be fresh: it may have adapters (with weights, disabled, fused), compiled or wrapped modules, hooks
that move or cast weights, and a process may have its global modes set. What can be trained with is kept as it is; what
would be lost, or would end in somebody else's error, is refused here with the call that helps.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import unwrapped
from trl_tafs.policy.options import PolicyOptions

if TYPE_CHECKING:
    from peft import LoraConfig

NEW_ADAPTER = "default"  # the name of the trained LoRA where none is asked for
FAKE_ADAPTER = "tafs_fake_score"  # of distribution matching's second LoRA (`policy.fake`)


@dataclass(frozen=True)
class FrozenAdapter:
    """A LoRA that stays as it is beneath the trained one."""

    name: str
    weight: float | None  # as `set_adapters` takes it; None: one of its own for each layer
    digest: str  # of its weights and strengths, in the dtype that they act in


@dataclass(frozen=True)
class TrainedAdapter:
    """Which LoRA is trained, of those that a pipeline carries or a new one, and what is active beneath it."""

    name: str
    is_new: bool
    beneath: tuple[str, ...] = ()  # active, in the order in which they act


# Adapters -----------------------------------------------------------------------------------------------------


def lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from ((name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


def adapter_layers(module: nn.Module) -> list[Any]:
    """Return PEFT's layers, in their order: what is switched often is found once."""
    return [layer for _, layer in lora_layers(module)]


def active_adapters(module: nn.Module) -> list[str]:
    """Return the names of the adapters that act in a module, in their order; none where they are disabled."""
    names = [name for _, layer in lora_layers(module) if not layer.disable_adapters for name in layer.active_adapters]
    return list(dict.fromkeys(names))


def choose_adapter(denoiser: nn.Module, config: PolicyOptions, lora_config: Any | None) -> TrainedAdapter:
    """Decide which LoRA is trained, and which ones are active beneath it.

    `model_adapter_name` says it: the name of one that the denoiser carries, or of a new one. Without it, the one that
    the denoiser carries is trained on; a new one is made where it carries none.

    Raises:
        ValueError: it isn't clear which one, or what is carried can't be trained with.
    """
    attached, active = dict(getattr(denoiser, "peft_config", {})), active_adapters(denoiser)
    name, listed = config.model_adapter_name, ", ".join(attached)
    if name == FAKE_ADAPTER:
        raise ValueError(f"model_adapter_name={name!r} is the name of distribution matching's own LoRA; use another")
    if not attached:
        return TrainedAdapter(name or NEW_ADAPTER, True)
    check_attached(denoiser)
    new = "a LoraConfig" if lora_config is not None else "adapter_name_or_path" if config.adapter_name_or_path else ""
    if name is None and (len(attached) > 1 or new):
        raise ValueError(
            f"the pipeline already carries the adapter{'s' if len(attached) > 1 else ''} {listed}; set "
            f"model_adapter_name='{next(iter(attached))}' to train that one on{' (without ' + new + ')' if new else ''}"
            ", or another name to train a new LoRA above what is active, which stays frozen; or call "
            "pipeline.unload_lora_weights() first"
        )
    name = name or next(iter(attached))
    if name in attached and new:
        raise ValueError(
            f"the pipeline already carries an adapter {name!r}, and {new} is for a new one; set another "
            "model_adapter_name, or leave it out"
        )
    beneath = tuple(other for other in active if other != name)
    parts = {part for path, _ in denoiser.named_modules() if ".lora_" not in path for part in path.split(".")}
    if clash := sorted(parts & {name, *beneath}):
        raise ValueError(f"the adapter's name {clash[0]!r} is also a module's of the denoiser; load it by another one")
    return TrainedAdapter(name, name not in attached, beneath)


def fake_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a denoiser's fake score by their names; none where it has no fake score."""
    part = f".{FAKE_ADAPTER}."
    return {name: parameter for name, parameter in denoiser.named_parameters() if part in f"{name}."}


def drop_fake(denoiser: nn.Module) -> None:
    """Take off the fake score that an earlier trainer left on a denoiser: the next one begins anew."""
    if FAKE_ADAPTER in getattr(denoiser, "peft_config", {}):
        denoiser.delete_adapters(FAKE_ADAPTER)


def check_attached(denoiser: nn.Module) -> None:
    """Raise ValueError if a denoiser carries adapters above which no other can act."""
    from peft import LoraConfig

    attached = dict(getattr(denoiser, "peft_config", {}))
    layers = adapter_layers(denoiser)
    if fused := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise ValueError(
            f"the adapters {', '.join(fused)} are fused into the denoiser and still attached; call "
            "pipeline.unload_lora_weights() to train on the fused weights, or pipeline.unfuse_lora() to keep them apart"
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"the pipeline carries {', '.join(attached)} and they are disabled (disable_lora); call "
            "pipeline.enable_lora() to train with them, or pipeline.unload_lora_weights() to train without"
        )
    for name, found in attached.items():
        if not isinstance(found, LoraConfig):
            raise ValueError(f"the adapter {name!r} is no LoRA ({type(found).__name__}); fuse it and unload it")


def activate(layers: Sequence[Any], names: tuple[str, ...], trained: str | None = None) -> None:
    """Make these adapters act in PEFT's layers, in this order; gradients are for `trained` alone."""
    for layer in layers:
        layer.set_adapter(list(names), inference_mode=True)
        if trained is not None:
            layer.set_requires_grad(trained, True)


def own_strength(layer: Any, name: str) -> float:
    """Return the strength of an adapter in a layer at weight 1: alpha / r, or alpha / sqrt(r) with rslora."""
    rank = layer.r[name]
    return layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name, False) else rank)


def adapter_weights(denoiser: nn.Module, name: str) -> dict[str, float]:
    """Return the weight of an adapter in each of its layers, as `set_adapters` set it."""
    layers = ((path, layer) for path, layer in lora_layers(denoiser) if name in layer.scaling)
    return {path: layer.scaling[name] / own_strength(layer, name) for path, layer in layers}


def carried_config(denoiser: nn.Module, name: str) -> LoraConfig:
    """Return an adapter's `LoraConfig` with the weight that `set_adapters` gave it in its alpha.

    What is published by it has the strength that it was trained with.
    """
    config = copy.deepcopy(denoiser.peft_config[name])  # type: ignore[index,union-attr]
    weights = adapter_weights(denoiser, name)
    if set(weights.values()) <= {1.0}:
        return config
    layers = dict(lora_layers(denoiser))
    alphas = {path: _plain(weight * layers[path].lora_alpha[name]) for path, weight in weights.items()}
    config.lora_alpha = max(alphas.values(), key=list(alphas.values()).count)
    config.alpha_pattern = {f"^{path}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}
    return config


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def frozen_adapter(denoiser: nn.Module, name: str) -> FrozenAdapter:
    """Return what a frozen adapter is known by."""
    digest, weights = hashlib.sha256(), adapter_weights(denoiser, name)
    for path, layer in lora_layers(denoiser):
        if name not in layer.scaling:
            continue
        digest.update(f"{path} {layer.scaling[name]!r}".encode())
        for kind in layer.adapter_layer_names:
            part = getattr(layer, kind)
            if name in part:
                tensors = part[name].parameters() if isinstance(part[name], nn.Module) else [part[name]]
                for tensor in tensors:
                    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    digest.update(f"{kind} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
    distinct = {round(weight, 6) for weight in weights.values()}
    return FrozenAdapter(name, distinct.pop() if len(distinct) == 1 else None, digest.hexdigest()[:16])


def frozen_settings(frozen: Sequence[FrozenAdapter]) -> dict[str, str]:
    """Return what a run's settings say of the frozen adapters; nothing where there are none."""
    told = [{"name": adapter.name, "weight": adapter.weight, "digest": adapter.digest} for adapter in frozen]
    return {"frozen_adapters": json.dumps(told)} if told else {}


# All else -----------------------------------------------------------------------------------------------------


def check_carried(pipeline: TAFSPipelineMixin, config: PolicyOptions, lora_config: Any | None = None) -> None:
    """Look at all that a pipeline and its process carry, before anything is moved.

    Raises:
        ValueError: something that can't be trained with; the message has the call that helps.
    """
    _check_process(config)
    drop_fake(pipeline.denoiser)
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    for name, module in modules.items():
        _check_wrapper(name, module)
        _check_hooks(name, module)
        if module is not getattr(pipeline, pipeline.denoiser_name) and any(True for _ in lora_layers(module)):
            raise ValueError(
                f"the pipeline's {name} carries a LoRA, which isn't trained and wouldn't be published; call "
                f"pipeline.unload_lora_weights(), or pipeline.fuse_lora() before it"
            )
        if any(parameter.is_inference() for parameter in module.parameters()):
            raise ValueError(
                f"the pipeline's {name} was made inside torch.inference_mode(), and its weights can't be trained "
                "with; load the pipeline outside of it"
            )
    if not config.full_finetuning:
        choose_adapter(pipeline.denoiser, config, lora_config)


def _check_process(config: PolicyOptions) -> None:
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized() and (before := AcceleratorState().mixed_precision) != config.mixed_precision:
        raise ValueError(
            f"mixed_precision is {config.mixed_precision!r}, and an earlier trainer or Accelerator of this process has "
            f"{before!r}, which Accelerate keeps for a process; use mixed_precision={before!r}, or another process"
        )
    if (dtype := torch.get_default_dtype()) != torch.float32:
        raise ValueError(
            f"torch's default dtype is {dtype}, in which noise levels and trained weights would be made, too; call "
            "torch.set_default_dtype(torch.float32) once the pipeline is loaded"
        )
    if (device := torch.get_default_device()).type != "cpu":
        raise ValueError(
            f"torch's default device is {device}, and the trainer places everything itself; call "
            "torch.set_default_device('cpu') once the pipeline is loaded"
        )


def _check_wrapper(name: str, module: nn.Module) -> None:
    from accelerate.utils import extract_model_from_parallel

    inside = unwrapped(module)
    if extract_model_from_parallel(inside, keep_torch_compile=True) is not inside:
        raise ValueError(
            f"the pipeline's {name} is wrapped as {type(inside).__name__}; give it the module itself, which the "
            "trainer's Accelerator wraps"
        )
    if any(hasattr(part, "_orig_mod") for part in inside.modules()):
        raise ValueError(
            f"parts of the pipeline's {name} are wrapped by torch.compile, which changes the names of their weights; "
            "compile them in place (module.compile(), or transformer.compile_repeated_blocks()), or the whole"
        )


_HOOK_REMEDIES = {
    "group_offloading": "load it again without enable_group_offload, and use model_cpu_offload=True",
    "layerwise_casting": "load it again without enable_layerwise_casting, or with a quantization_config",
}


def _check_hooks(name: str, module: nn.Module) -> None:
    for part in unwrapped(module).modules():
        if hasattr(part, "_hf_hook"):
            raise ValueError(
                f"the pipeline's {name} has a hook of Accelerate, as enable_model_cpu_offload, "
                "enable_sequential_cpu_offload or device_map leave one; call pipeline.remove_all_hooks() and use "
                "model_cpu_offload=True"
            )
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        for hook in hooks:
            remedy = next((text for kind, text in _HOOK_REMEDIES.items() if hook.startswith(kind)), None)
            raise ValueError(
                f"the pipeline's {name} has diffusers' hook {hook!r}; "
                + (remedy or "disable it (disable_cache() for a cache), or load the pipeline again")
            )
