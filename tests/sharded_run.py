"""The body of test_sharding.py, by torchrun with gloo: two processes by DDP and by FSDP2, one after the other."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import distributed_run  # finds what the others import
import families
import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from trl_tafs import NonFiniteError
from trl_tafs.rewards import RewardError

RUN = {"sharded": True, "beta": 0.01, "train_learning_rate": 1e-3, "train_gradient_checkpointing": True}


def plain_again():
    """Accelerate keeps for a process what its first trainer was launched as."""
    AcceleratorState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def compared(folder, model, **changes):
    """The same run by DDP and by FSDP2; `model()` gives a pipeline."""
    plain_again()
    found = {}
    for kind in ("ddp", "fsdp2"):
        settings = RUN | changes | {"sharded": kind == "fsdp2"}
        found[kind] = distributed_run.run(folder / kind, model(), 2, **settings)
    return found


def faults(folder, model):
    """Runs by FSDP2 that something stops on one of the processes alone, and how they go on."""
    found = {}
    try:  # the second batch, after the preflight and the first
        distributed_run.run(folder / "failed", model, 2, fail_at=3, **RUN)
    except RewardError as error:
        found["error"] = str(error)
    if torch.distributed.get_rank() == 1:  # of what was kept, less is left on this process
        for path in (folder / "failed" / "pending").glob("*rank_1*"):
            path.unlink()
    torch.distributed.barrier()
    found["resumed"] = distributed_run.run(folder / "failed", model, 2, resume="latest", **RUN)
    for early in (True, False):
        try:
            place = folder / f"spoiled_{early}"
            distributed_run.run(place, model, 2, spoiled=1, preflight_rollout=early, **RUN)
        except NonFiniteError as error:
            found["spoiled", early] = str(error)
    try:
        distributed_run.run(folder / "stopped", model, 2, signal_at=2, **RUN)
    except SystemExit as error:
        found["code"] = error.code
    found["continued"] = distributed_run.run(folder / "stopped", model, 2, resume="latest", **RUN)
    return found


def main(folder, model, *names):
    """Without a family's name: all that one model is tried for; else DDP and FSDP2 of each family."""
    results = {}
    if not names:
        for precision in ("no", "bf16"):
            settings = {"mixed_precision": precision, "examined": precision == "no"}
            results[precision] = compared(folder / precision, lambda: tiny.load(model), **settings)
        results["flat"] = compared(folder / "flat", lambda: tiny.load(model), flat=True, beta=0.0)
        results |= faults(folder, model)
    for name in names:
        size = families.FAMILIES[name].size
        settings = {"height": size, "width": size, "prompt_function": ["a cat", "red dog", "two"]}
        settings["max_sequence_length"] = families.LENGTH

        def model_of(name=name):
            return families.ours(families.stock(name), name)

        results[name] = compared(folder / name, model_of, **settings)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=900))
    folder = Path(sys.argv[1])
    results = main(folder, *sys.argv[2:])
    torch.save(results, folder / f"result_{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
