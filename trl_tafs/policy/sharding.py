"""FSDP2 by Accelerate's plugin: the frozen base in shards, the adapters whole on every process.

Each process keeps an equal part of every base weight, and gathers a block's when it computes it. LoRAs are few bytes of
many small matrices, which a shard would leave without rows: they stay outside, as the plugin's `ignored_modules`, and
their gradients are averaged once an optimizer step, as DDP would. What is saved, averaged, checked and resumed is
therefore the same with shards and without.

An evaluation of the denoiser is then one of all processes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trl_tafs.pipelines.quantized import is_quantized
from trl_tafs.policy.options import PolicyOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that evaluate the denoiser unequally often on the processes, move its weights, or train them.
NOT_SHARDED = {
    "full_finetuning": "only a frozen base is sharded; train a LoRA, or launch with plain data parallel",
    "matches_distribution": "its fake score is evaluated unequally often on the processes; use dm_weight=0",
    "model_cpu_offload": "it moves whole weights; shards are small already, leave it out",
    "torch_compile": "it hasn't been tried with shards; leave it out",
}


def is_sharded(accelerator: Any) -> bool:
    """Return whether an Accelerator shards the model that it prepares, by FSDP2."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def check_shards(options: PolicyOptions) -> None:
    """Raise ValueError, with the remedy, for an option that sharding excludes."""
    for name, reason in NOT_SHARDED.items():
        if getattr(options, name):
            shown = "dm_weight" if name == "matches_distribution" else name
            raise ValueError(f"{shown} can't be had while FSDP2 shards the denoiser: {reason} (docs/scaling.md)")


def check_shardable(denoiser: nn.Module) -> None:
    """Raise ValueError for a denoiser that can't be sharded: a quantized one, or one that is already."""
    name = type(denoiser).__name__
    if is_quantized(denoiser):
        raise ValueError(
            f"FSDP2 can't shard a quantized {name}, which is small already; launch with plain data parallel, or load "
            "it without a quantization_config"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in denoiser.parameters()):
        raise ValueError(f"the pipeline's {name} is sharded already, by an earlier trainer; load the pipeline anew")


def block_names(denoiser: nn.Module) -> list[str]:
    """Return the class names of the blocks that are gathered one at a time.

    They are those that the model says not to split or, where it says none that it has, those in its lists of modules.
    """
    classes = {type(module).__name__ for module in denoiser.modules()}
    named = [name for name in getattr(denoiser, "_no_split_modules", None) or () if name in classes]
    lists = (child for child in denoiser.children() if isinstance(child, nn.ModuleList))
    return named or sorted({type(block).__name__ for blocks in lists for block in blocks})


def adapter_modules(layers: Sequence[Any]) -> list[nn.Module]:
    """Return what PEFT's layers hold of all adapters: modules of small matrices by the adapter's name."""
    held = (getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names)
    return [module for module in held if isinstance(module, nn.Module)]


def prepare(
    denoiser: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, layers: Sequence[Any]
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`; where that shards, with the adapters left whole, and autocast as without shards.

    Args:
        denoiser: with its adapters, on the CPU if it is to be sharded; it becomes the sharded one in place.
        optimizer: of the trained parameters.
        accelerator: of the run.
        layers: PEFT's, all of them.
    """
    if not is_sharded(accelerator):
        return accelerator.prepare(denoiser, optimizer)
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin, adapters = accelerator.state.fsdp_plugin, adapter_modules(layers)
    for module in adapters:
        module.to(accelerator.device)
    plugin.ignored_modules = adapters
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or block_names(denoiser)
    prepared, optimizer = accelerator.prepare(denoiser, optimizer)
    # What is outside the blocks, too: were it left gathered, a process that saves (`state_dict` gives it back) would
    # gather it again, alone.
    prepared.set_reshard_after_forward(True)
    if accelerator.mixed_precision != "no":
        _put_on_autocast(prepared, accelerator)
    return prepared, optimizer


def _put_on_autocast(denoiser: nn.Module, accelerator: Accelerator) -> None:
    """Do as Accelerate does to a model that it doesn't shard: autocast in, float32 out. `take_off_autocast` undoes it.

    FSDP2's own mixed precision would cast what the base keeps in float32, and not the adapters.
    """
    from accelerate.utils import convert_outputs_to_fp32

    denoiser._original_forward = forward = denoiser.forward

    @wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    denoiser.forward = convert_outputs_to_fp32(within)


def shard_count(accelerator: Any) -> int | None:
    """Return the number of shards in which the denoiser will lie; None: it stays whole."""
    return accelerator.num_processes if is_sharded(accelerator) else None


@torch.no_grad()
def averaged(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> Sequence[nn.Parameter]:
    """Return the parameters with the mean of all processes' gradients: DDP has seen to it, beside shards it is here.

    One message for each dtype.
    """
    for gradients in _by_dtype(parameters) if is_sharded(accelerator) else ():
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return parameters


def _by_dtype(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        yield [gradient for gradient in gradients if gradient.dtype == dtype]


def shards_line(denoiser: nn.Module) -> str:
    """Return what a process keeps of a sharded denoiser, and how it is gathered, in one line."""
    from torch.distributed.fsdp import FSDPModule

    shards = [parameter for parameter in denoiser.parameters() if hasattr(parameter, "to_local")]
    own, whole = sum(shard.to_local().nbytes for shard in shards), sum(shard.nbytes for shard in shards)
    units = sum(isinstance(module, FSDPModule) for module in denoiser.modules())
    processes = shards[0].device_mesh.size()
    return (
        f"FSDP2: the denoiser lies in shards on {processes} processes, {own / 2**20:.4g} of {whole / 2**20:.4g} MiB "
        f"here, gathered in {units} parts"
    )
