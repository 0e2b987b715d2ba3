"""Try things and leave no trace: weights, optimizer, averages, statistics and generators are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_tafs.policy.policy import Policy
from trl_tafs.training.checkpoint_files import Stateful


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put Python's, NumPy's, torch's and each GPU's global generator back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def copied(state: Any) -> Any:
    """Return a copy of a state that shares no tensor with it, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state


@contextmanager
def leaving_no_trace(policy: Policy, states: Mapping[str, Stateful]) -> Iterator[None]:
    """Put everything that moves in training back afterwards, to the bit, whatever happens inside.

    Args:
        policy: its trained weights are kept on the CPU meanwhile.
        states: everything else that moves, as a checkpoint has it.
    """
    accelerator = policy.accelerator
    weights = [copied(parameter) for parameter in policy.parameters]
    kept = {name: copied(item.state_dict()) for name, item in states.items()}
    counted = accelerator.step, accelerator.gradient_accumulation_steps
    try:
        with generators_kept():
            yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(policy.parameters, weights, strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        for name, item in states.items():
            item.load_state_dict(kept[name])
        accelerator.step, accelerator.gradient_accumulation_steps = counted
