"""A run's memory plan, and the settings under which it fits a device."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trl_tafs.options import own_copy
from trl_tafs.output.errors import first_line
from trl_tafs.output.speech import is_heard, say, warn
from trl_tafs.policy.sharding import is_sharded
from trl_tafs.training.memory import MemoryPlan, measure_footprint, plan_memory, reward_bytes
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.simulation import Simulation

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that make a run smaller and change nothing in it but rounding: the cheapest in time first.
SWITCHES = (
    {"decode_batch_size": 1},
    {"offload_text_encoders": True},
    {"train_gradient_checkpointing": True},
)
LAST = ({"train_use_8bit_adam": True}, {"model_cpu_offload": True})


def make_plan(
    simulation: Simulation,
    options: TrainingOptions,
    plan: EpochPlan,
    *,
    rewards: int = 0,
    quantized: Mapping[str, float] | None = None,
    capacity: int | None = None,
    sharded: bool = False,
) -> MemoryPlan:
    """Plan a run's memory, with the settings under which it fits where it doesn't.

    Args:
        simulation: of the pipeline, at the size of training.
        options: of the run.
        plan: an epoch's.
        rewards: bytes of the rewards' own models on the device.
        quantized: bytes of a linear layer's weight in components that will be loaded quantized.
        capacity: bytes of the device; None: any.
        sharded: whether FSDP2 shards the denoiser among the plan's processes.
    """

    def planned(changed: TrainingOptions) -> MemoryPlan:
        return plan_memory(measure_footprint(simulation, changed, rewards, quantized), changed, plan, sharded=sharded)

    made = planned(options)
    if capacity is None or made.peak() <= capacity:
        return made
    return dataclasses.replace(made, advice=advice(options, planned, capacity, bool(quantized) or sharded))


def advice(
    options: TrainingOptions, planned: Callable[[TrainingOptions], MemoryPlan], capacity: int, stays: bool = False
) -> tuple[str, ...]:
    """Return settings under which a run fits, none of which can be left out; none where nothing helps.

    Args:
        options: under which it doesn't.
        planned: the plan under some options.
        capacity: bytes of the device.
        stays: whether the base is quantized or sharded, which `model_cpu_offload` refuses.
    """
    taken: dict[str, Any] = {}
    best = planned(options).peak()
    for change in _changes(options, stays):
        peak = planned(with_settings(options, taken | change)).peak()
        if peak < best:
            taken, best = taken | change, peak
        if best <= capacity:
            break
    else:
        return ()
    for name in list(taken):  # those that another one made needless
        if name == "sample_num_batches_per_epoch":
            continue
        pair = {name, "sample_num_batches_per_epoch"} if name == "sample_batch_size" else {name}
        rest = {key: value for key, value in taken.items() if key not in pair}
        if planned(with_settings(options, rest)).peak() <= capacity:
            taken = rest
    return tuple(f"{name}={value}" for name, value in taken.items())


def _changes(options: TrainingOptions, stays: bool) -> Iterator[dict[str, Any]]:
    yield from (change for change in SWITCHES if any(getattr(options, name) != value for name, value in change.items()))
    yield from ({"train_batch_size": size} for size in _halves(options.train_batch_size))
    images = options.sample_batch_size * options.sample_num_batches_per_epoch
    for size in _halves(options.sample_batch_size):
        yield {"sample_batch_size": size, "sample_num_batches_per_epoch": images // size}
    for change in LAST:
        if "model_cpu_offload" not in change or not (options.full_finetuning or stays):
            yield change


def _halves(size: int) -> list[int]:
    """Return the divisors of a batch size below it, the largest first."""
    return [part for part in range(size - 1, 0, -1) if size % part == 0]


def with_settings(options: TrainingOptions, changes: Mapping[str, Any]) -> TrainingOptions:
    """Return a copy of the options with others."""
    copied = own_copy(options)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


def announce_plan(
    simulation: Simulation, options: TrainingOptions, plan: EpochPlan, accelerator: Accelerator, rewards: Iterable[Any]
) -> MemoryPlan | None:
    """Say what a run will hold, before anything is moved, on the main process; None where nobody would read it.

    On a GPU it is always made, and a warning where it doesn't fit; on a CPU only where progress bars are wanted and
    somebody reads them. A plan that can't be made costs a warning.

    Args:
        simulation: of the pipeline.
        options: of the run.
        plan: an epoch's.
        accelerator: of the run.
        rewards: all reward functions.
    """
    device = accelerator.device
    silent = options.disable_tqdm or not is_heard()
    if not accelerator.is_main_process or (device.type != "cuda" and silent):
        return None
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    try:
        sharded = is_sharded(accelerator)
        made = make_plan(simulation, options, plan, rewards=reward_bytes(rewards), capacity=capacity, sharded=sharded)
    except Exception as error:  # of a model's code that can't do without values
        warnings.warn(f"the memory plan can't be made ({first_line(error)}); training goes on", stacklevel=2)
        return None
    if capacity is not None and made.peak() > capacity:
        warn(made.report(capacity))
    elif not silent:
        say(made.line(capacity))
    return made
