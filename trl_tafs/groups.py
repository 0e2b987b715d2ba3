"""How many images each prompt of an epoch gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_tafs.config import TAFSGRPOConfig

PAPER_GROUP_SIZE = 48


def resolve_group_size(num_generations: int | None, total: int) -> int:
    """The group size G for an epoch of `total` images.

    None means the paper's 48, or the largest divisor of `total` up to 48 where 48 doesn't divide it.

    Raises:
        ValueError: G doesn't divide `total`, or is below 2; the message names sizes that do.
    """
    divisors = [g for g in range(2, total + 1) if total % g == 0]
    if num_generations is None:
        fitting = [g for g in divisors if g <= PAPER_GROUP_SIZE]
        if not fitting:
            raise ValueError(
                f"an epoch of {total} images has no group size from 2 to {PAPER_GROUP_SIZE} that divides it; change "
                "sample_batch_size, sample_num_batches_per_epoch or the number of processes"
            )
        return fitting[-1]
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}; a group-relative advantage needs at least 2")
    if total < 2:
        raise ValueError(f"an epoch of {total} images has no group; raise sample_num_batches_per_epoch")
    if total % num_generations:
        below = [g for g in divisors if g < num_generations][-1:]
        above = [g for g in divisors if g > num_generations][:1]
        raise ValueError(
            f"{total} images an epoch (sample_batch_size x sample_num_batches_per_epoch x processes) don't divide "
            f"into groups of {num_generations}; use num_generations={' or '.join(map(str, below + above))}"
        )
    return num_generations


@dataclass(frozen=True)
class EpochPlan:
    """The arithmetic of one epoch. Rows are (image, step) pairs."""

    world_size: int
    local_images: int  # a process's
    group_size: int  # G
    num_groups: int  # over all processes
    images_per_update: int  # a process's, between two optimizer steps
    updates_per_inner_epoch: int
    micro_batches_per_update: int  # forward and backward passes

    @property
    def total_images(self) -> int:
        """Of all processes together."""
        return self.local_images * self.world_size


def plan_epoch(config: TAFSGRPOConfig, world_size: int) -> EpochPlan:
    """The sizes of an epoch, checked.

    Raises:
        ValueError: something doesn't divide; says the numbers, and which would.
    """
    local = config.sample_batch_size * config.sample_num_batches_per_epoch
    group_size = resolve_group_size(config.num_generations, local * world_size)
    batch = config.train_batch_size
    if local % batch:
        fitting = [size for size in range(1, batch + 1) if local % size == 0]
        raise ValueError(
            f"{local} images a process (sample_batch_size={config.sample_batch_size} x sample_num_batches_per_epoch="
            f"{config.sample_num_batches_per_epoch}) don't divide into minibatches of train_batch_size={batch}; use "
            f"train_batch_size={fitting[-1]}"
        )
    batches = local // batch
    accumulation = config.train_gradient_accumulation_steps or batches
    if batches % accumulation:
        fitting = [size for size in range(1, accumulation + 1) if batches % size == 0]
        raise ValueError(
            f"{batches} minibatches an epoch don't divide into train_gradient_accumulation_steps={accumulation}; use "
            f"{fitting[-1]}, or None for one optimizer step"
        )
    return EpochPlan(
        world_size=world_size,
        local_images=local,
        group_size=group_size,
        num_groups=local * world_size // group_size,
        images_per_update=batch * accumulation,
        updates_per_inner_epoch=batches // accumulation,
        micro_batches_per_update=accumulation * config.num_replayed_rows,
    )
