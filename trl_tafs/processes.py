"""What several processes of one run do together: agree, share, gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_tafs.output.speech import on_terminal


def any_process(accelerator: Any, flag: bool) -> bool:
    """Return whether the flag is up on any process."""
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(total.item() > 0)


def least(accelerator: Any, number: int) -> int:
    """Return the smallest number of any process."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def raise_everywhere(accelerator: Any, fault: BaseException | None, kind: type[Exception], where: str) -> None:
    """Raise an error of `kind` on every process if the fault of any is one; every process calls it."""
    mine = fault if isinstance(fault, kind) else None
    if any_process(accelerator, mine is not None):
        raise kind(f"{where}: {mine or f'{kind.__name__} on another process'}") from mine


def same_everywhere(accelerator: Any, value: Any) -> Any:
    """Return the main process's value on every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def share(accelerator: Any, count: int) -> slice:
    """Return this process's consecutive share of `count` items, which divide among the processes."""
    size = count // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def gather_rows(accelerator: Any, rows: Tensor) -> Tensor:
    """Return the rows of all processes, in their order, on the CPU."""
    if accelerator.num_processes == 1:  # not by a device that may have no float64
        return rows.cpu()
    return accelerator.gather(rows.to(accelerator.device)).cpu()


def progress_bar(accelerator: Any, disable: bool, *args: Any, **options: Any) -> Any:
    """Return a tqdm bar that is shown by each machine's first process, where there is a terminal or a notebook."""
    from tqdm.auto import tqdm

    hidden = disable or not accelerator.is_local_main_process or not on_terminal()
    return tqdm(*args, disable=hidden, **options)
