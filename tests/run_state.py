"""All that a run is known by, compared to the bit; and a function that sends this process a signal."""

import json
import os
import signal
from pathlib import Path

import torch

from trl_tafs.policy.lora import adapter_state_dict


def everything(trainer):
    """All that a run is known by: weights, states, counters, the log without what it took this time."""
    log = Path(trainer.config.project_dir, "metrics.jsonl").read_text().splitlines()
    took = ("time", "images_per_second", "evaluations_per_image")  # rollouts that were kept aren't drawn again
    lines = [{k: v for k, v in json.loads(line).items() if not k.startswith(took)} for line in log]
    states = {name: item.state_dict() for name, item in trainer.checkpoints.states.items()}
    weights = adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)
    return {"weights": weights, "states": states, "progress": trainer.progress.state_dict(), "log": lines}


def same(mine, theirs):
    """Whether two nested values are equal, tensors to the bit."""
    if isinstance(mine, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == theirs or (mine != mine and theirs != theirs)


class Signalling:
    """Calls what it wraps, and sends this process a signal at one of the calls."""

    def __init__(self, function, at, number=signal.SIGTERM):
        self.function, self.at, self.number, self.calls, self.__name__ = function, at, number, 0, "noisy"

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return self.function(*arguments)
