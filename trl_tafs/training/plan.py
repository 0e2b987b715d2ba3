"""The arithmetic of an epoch: images, groups, minibatches and optimizer steps, checked before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from trl_tafs.method.allocation import GroupBounds
from trl_tafs.training.options import TrainingOptions

PAPER_GROUP_SIZE = 48


def resolve_group_size(num_generations: int | None, total: int, *, alone: bool = False) -> int:
    """Return the group size G for an epoch of `total` images.

    None means the paper's 48, or the largest divisor of `total` up to 48 where 48 doesn't divide it. `alone` allows
    groups of one, whose baseline isn't the group's.

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
    if num_generations == 1 and alone:
        return 1
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
    """The arithmetic of one epoch."""

    world_size: int
    local_images: int  # a process's
    group_size: int  # G
    num_groups: int  # over all processes
    images_per_update: int  # a process's, between two optimizer steps
    updates_per_inner_epoch: int
    micro_batches_per_update: int  # forward and backward passes
    least_images: int  # of a prompt
    most_images: int  # of a prompt

    @property
    def group_bounds(self) -> GroupBounds:
        """Images of a prompt, on the average, at least and at most."""
        return GroupBounds(self.group_size, self.least_images, self.most_images)

    @property
    def total_images(self) -> int:
        """Of all processes together."""
        return self.local_images * self.world_size

    def line(self, inner_epochs: int) -> str:
        """Return the arithmetic in one line, such as "96 images: 2 prompts x 48; 1 optimizer step an epoch"."""
        size = str(self.group_size)
        if self.least_images != self.most_images:
            size = f"{self.least_images} to {self.most_images}, {self.group_size} on the average"
        steps = self.updates_per_inner_epoch * inner_epochs
        spread = f" on {self.world_size} processes" if self.world_size > 1 else ""
        return (
            f"{self.total_images} images{spread}: {self.num_groups} prompt{'s' * (self.num_groups > 1)} x {size}; "
            f"{steps} optimizer step{'s' * (steps > 1)} an epoch"
        )


def plan_epoch(options: TrainingOptions, world_size: int) -> EpochPlan:
    """Work out the sizes of an epoch, and check them.

    Raises:
        ValueError: something doesn't divide; says the numbers, and which would.
    """
    local = options.sample_batch_size * options.sample_num_batches_per_epoch
    alone = options.per_prompt_stat_tracking
    group_size = resolve_group_size(options.num_generations, local * world_size, alone=alone)
    batch = options.train_batch_size
    if local % batch:
        fitting = [size for size in range(1, batch + 1) if local % size == 0]
        raise ValueError(
            f"{local} images a process (sample_batch_size={options.sample_batch_size} x sample_num_batches_per_epoch="
            f"{options.sample_num_batches_per_epoch}) don't divide into minibatches of train_batch_size={batch}; use "
            f"train_batch_size={fitting[-1]}"
        )
    batches = local // batch
    updates = options.train_updates_per_epoch
    if updates is not None and batches % updates:
        fitting = [size for size in range(1, batch + 1) if local % (size * updates) == 0]
        use = f"train_batch_size={fitting[-1]}, or " if fitting else ""
        raise ValueError(
            f"{batches} minibatches an epoch don't divide into train_updates_per_epoch={updates} optimizer steps; use "
            f"{use}train_updates_per_epoch=1"
        )
    accumulation = batches // updates if updates else options.train_gradient_accumulation_steps or batches
    if batches % accumulation:
        fitting = [size for size in range(1, accumulation + 1) if batches % size == 0]
        raise ValueError(
            f"{batches} minibatches an epoch don't divide into train_gradient_accumulation_steps={accumulation}; use "
            f"{fitting[-1]}, or None for one optimizer step"
        )
    if batches == accumulation and options.train_num_inner_epochs == 1 and not options.old_policy_decay:
        for name in options.needs_several_updates:
            raise ValueError(
                f"{name}={getattr(options, name)} has no effect with one optimizer step an epoch, which is on policy; "
                f"leave it out, or use train_num_inner_epochs=2 or a train_gradient_accumulation_steps below {batches}"
            )
    least, most = group_bounds(options, group_size, local * world_size, world_size)
    return EpochPlan(
        world_size=world_size,
        local_images=local,
        group_size=group_size,
        num_groups=local * world_size // group_size,
        images_per_update=batch * accumulation,
        updates_per_inner_epoch=batches // accumulation,
        micro_batches_per_update=accumulation * options.num_replayed_rows,
        least_images=least,
        most_images=most,
    )


def group_bounds(options: TrainingOptions, group_size: int, total: int, world_size: int) -> tuple[int, int]:
    """Least and most images of a prompt; both G where sizes are fixed.

    Raises:
        ValueError: G lies outside, or the first wave of streaming can't be whole batches on every process.
    """
    if options.group_allocation == "fixed":
        return group_size, group_size
    if options.group_allocation == "superflow":
        least = group_size - options.group_bins + 1
        if least < 1:
            raise ValueError(
                f"group_bins={options.group_bins} takes up to {options.group_bins - 1} images from a group of "
                f"num_generations={group_size}; use group_bins={group_size} at most"
            )
        return least, group_size + options.group_bins
    least, most = options.min_generations or max(2, group_size // 4), options.max_generations or 4 * group_size
    if options.group_allocation == "streaming":
        least = _first_wave(options, group_size, total // group_size, world_size, least)
    if not least <= group_size <= most:
        raise ValueError(
            f"num_generations is {group_size}, the mean of groups of {least} to {most} images; set min_generations and "
            "max_generations on either side of it"
        )
    return least, most


def _first_wave(options: TrainingOptions, group_size: int, num_groups: int, world_size: int, wanted: int) -> int:
    """Images of each prompt in streaming's first wave: what is asked for, or what fits near a default."""
    batch = options.sample_batch_size * world_size
    fitting = [size for size in range(2, group_size) if num_groups * size % batch == 0]
    if options.min_generations is None and fitting:
        return min(fitting, key=lambda size: abs(size - wanted))
    if wanted not in fitting:
        raise ValueError(
            f"a first wave of {num_groups} prompts x {wanted} images must be below num_generations={group_size} each, "
            f"and divide into {world_size} x sample_batch_size={options.sample_batch_size}; use "
            + (f"min_generations={' or '.join(map(str, fitting))}" if fitting else "a smaller sample_batch_size")
        )
    return wanted
