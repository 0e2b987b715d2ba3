"""The body of test_four_processes.py: five epochs, and two of unequal groups, by torchrun or in one process."""

import sys
from pathlib import Path

import distributed_run
import torch

SETTINGS = {"num_epochs": 5, "save_freq": 5}
UNEQUAL = {"group_allocation": "streaming", "min_generations": 4, "sample_batch_size": 2}


def runs(folder, model, world, **changes):
    """16 images an epoch in batches of 4, in two groups of 8: with four processes each group lies on two of them."""
    found = {"equal": distributed_run.run(folder / "equal", model, 4 // world, **SETTINGS, **changes)}
    found["unequal"] = distributed_run.run(folder / "unequal", model, 8 // world, **UNEQUAL, **changes)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, world = Path(sys.argv[1]), torch.distributed.get_world_size()
    result = runs(folder, sys.argv[2], world, sharded=sys.argv[3] == "fsdp2")
    torch.save(result, folder / f"result_{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
