"""What a run is launched with: processes, trackers, Accelerator's arguments; refused here where it can't be had."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trl_tafs.output.writable import check_writable
from trl_tafs.policy.sharding import check_shards, is_sharded
from trl_tafs.rewards.scoring import check_signature
from trl_tafs.training.options import TrainingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

EXTRAS = ("tensorboard", "trackio", "wandb")  # trackers that setup.cfg has an extra for
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # processes, by torchrun and by MPI's launchers
# Ways of launching that split a model and aren't supported, by the environment of `accelerate launch`.
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Arguments of Accelerator that a field sets, that shard a model, and that a run without data loaders never reads.
SET_BY = {
    "mixed_precision": "mixed_precision",
    "log_with": "log_with",
    "project_dir": "project_kwargs",
    "project_config": "project_kwargs",
    "gradient_accumulation_steps": "train_gradient_accumulation_steps",
    "gradient_accumulation_plugin": "train_gradient_accumulation_steps",
}
SHARDS = {
    *("deepspeed_plugin", "deepspeed_plugins", "megatron_lm_plugin", "torch_tp_plugin"),
    "parallelism_config",
}
UNREAD = {"split_batches", "dataloader_config", "rng_types", "step_scheduler_with_optimizer"}
DATA_PARALLEL = "launch with plain data parallel (accelerate launch --multi_gpu, or torchrun)"


def check_launch(config: TrainingOptions, hook: Any | None = None) -> None:
    """Refuse what this machine can't give a run, before a model is moved.

    Args:
        config: of the run.
        hook: the user's, for an epoch's samples.

    Raises:
        ValueError: a package, a tracker, an argument or a way of launching that isn't there; says which, and the
            remedy.
    """
    if config.train_use_8bit_adam and find_spec("bitsandbytes") is None:
        raise ValueError('train_use_8bit_adam needs bitsandbytes: pip install "trl_tafs[8bit]"')
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise ValueError(
                f"this run was launched for {name} ({variable}=true), which this trainer doesn't support; "
                f"{DATA_PARALLEL}, or with FSDP2 (docs/scaling.md)"
            )
    if (plugin := fsdp_plugin(config.accelerator_kwargs)) is not None:
        _check_plugin(plugin)
        check_shards(config)
    if hook is not None:
        check_signature(hook, "image_samples_hook", "rows, global_step, tracker")
    _check_accelerator_kwargs(config.accelerator_kwargs)
    _check_trackers(config)


def fsdp_plugin(given: Mapping[str, Any]) -> Any | None:
    """Return Accelerate's plugin of FSDP: the one that `accelerator_kwargs` have, or that `accelerate launch` asks for.

    Precision is left to autocast, so that what is computed is the same with shards and without.
    """
    plugin = given.get("fsdp_plugin")
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin() if plugin is None else plugin
    if isinstance(plugin, FullyShardedDataParallelPlugin) and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    return plugin


def _check_plugin(plugin: Any) -> None:
    """Raise ValueError, naming the line of the configuration to change, for a plugin of FSDP that can't be used."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import is_torch_version
    from torch.distributed.fsdp import CPUOffloadPolicy

    if not isinstance(plugin, FullyShardedDataParallelPlugin):
        raise ValueError(
            f"accelerator_kwargs: fsdp_plugin is {plugin!r}; give accelerate's FullyShardedDataParallelPlugin"
        )
    if is_torch_version("<", "2.7.0"):
        raise ValueError("FSDP2 with adapters needs torch 2.7 or newer, which can leave them whole; upgrade torch")
    faults = {
        "fsdp_version": plugin.fsdp_version != 2 and "this trainer shards by FSDP2; set fsdp_version: 2",
        # Transformers' and diffusers' loaders would leave the text encoders of all processes but the first empty.
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading
        and "other processes' models would be empty; set fsdp_cpu_ram_efficient_loading: false",
        "fsdp_activation_checkpointing": plugin.activation_checkpointing
        and "it renames the adapter's layers; use train_gradient_checkpointing=True",
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        and "it hasn't been tried; set fsdp_offload_params: false, and shard among more GPUs",
    }
    for name, fault in faults.items():
        if fault:
            value = getattr(plugin, name, getattr(plugin, name.removeprefix("fsdp_"), True))
            raise ValueError(f"this run was launched for FSDP with {name}={value}: {fault} (docs/scaling.md)")


def shard_on_cpu(accelerator: Accelerator, plugin: Any) -> None:
    """Let processes on CPUs shard as those on GPUs do.

    Accelerate takes its FSDP path on accelerators alone; all that it needs is this state. Everything that it does then,
    `fully_shard` by the plugin's policy, runs on CPUs over gloo as well: to try a configuration, slowly.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    kinds = (DistributedType.MULTI_CPU, DistributedType.FSDP)  # the second: of an earlier trainer of these processes
    if accelerator.device.type == "cpu" and accelerator.distributed_type in kinds:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def _check_accelerator_kwargs(given: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field to use, for an argument of `Accelerator` that isn't to be given there."""
    import inspect

    from accelerate import Accelerator
    from accelerate.utils import KwargsHandler

    known = [name for name in inspect.signature(Accelerator.__init__).parameters if name != "self"]
    free = [name for name in known if name not in (*SET_BY, *SHARDS, *UNREAD)]
    for name in given:
        if name in SET_BY:
            raise ValueError(f"accelerator_kwargs has {name!r}, which the field {SET_BY[name]} sets; use that")
        if name in SHARDS:
            raise ValueError(f"accelerator_kwargs has {name!r}, which shards a model; {DATA_PARALLEL}")
        if name in UNREAD:
            raise ValueError(
                f"accelerator_kwargs has {name!r}, without effect as there is no data loader; leave it out"
            )
        if name not in known:
            raise ValueError(f"accelerator_kwargs has {name!r}, which Accelerator doesn't take; use {', '.join(free)}")
    handlers = given.get("kwargs_handlers") or []
    if not isinstance(handlers, (list, tuple)) or not all(isinstance(item, KwargsHandler) for item in handlers):
        raise ValueError(
            f"accelerator_kwargs: kwargs_handlers is {handlers!r}; give a list of accelerate.utils' objects, such as "
            "InitProcessGroupKwargs(timeout=...), from Python"
        )


def _check_trackers(config: TrainingOptions) -> None:
    """Raise ValueError for a tracker that isn't there, options of one that isn't used, a log that can't be written."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    named, available = config.log_with, [str(name) for name in get_available_trackers()]
    known = list(LOGGER_TYPE_TO_CLASS)
    registered = set(known) - set(LoggerType.list())  # by accelerate's `register_tracker_class`
    if named not in (None, "all", *known):
        raise ValueError(f"log_with is {named!r}; use one of {', '.join(known)}, all, or None for metrics.jsonl alone")
    if named == "all" and not available:
        raise ValueError("log_with is 'all', and no tracker is installed; pip install \"trl_tafs[tensorboard]\"")
    if named not in (None, "all", *available, *registered):
        package = f'"trl_tafs[{named}]"' if named in EXTRAS else named
        raise ValueError(f"log_with is {named!r}, which isn't installed: pip install {package}")
    used = available if named == "all" else [named]
    if unused := [name for name in config.tracker_kwargs if name not in used]:
        raise ValueError(
            f"tracker_kwargs are for {', '.join(map(repr, unused))}, and log_with is {named!r}; write the keyword "
            'arguments below their tracker\'s name, such as {"wandb": {"entity": "..."}}'
        )
    if any(name is not None and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory for name in used):
        folder = config.project_kwargs.get("logging_dir")
        if folder is not None:
            check_writable(folder, "project_kwargs: logging_dir")


def check_processes(accelerator: Accelerator) -> None:
    """Refuse processes that don't know of each other, and a model that is split among them by anything but FSDP2.

    Raises:
        ValueError: more processes were launched than this one is of: each would be a run of its own in one folder.
    """
    launched = {name: os.environ[name] for name in WORLD_SIZES if os.environ.get(name, "").isdecimal()}
    for name, count in launched.items():
        if int(count) > accelerator.num_processes:
            raise ValueError(
                f"{count} processes were launched ({name}={count}), and Accelerate sees {accelerator.num_processes}: "
                "each would be a run of its own in one folder. Make as many GPUs visible as there are processes, or "
                "set ACCELERATE_USE_CPU=1 to run them on the CPU"
            )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if is_sharded(accelerator):
        return
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"Accelerate was set up for {kind}, which this trainer doesn't support; {DATA_PARALLEL}")
