"""Back to where an epoch began, if a signal comes while its weights are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trl_tafs.training.checkpoint import Checkpoints
from trl_tafs.training.checkpoint_files import generators, set_generators
from trl_tafs.training.stopping import Stopped


@dataclass
class Rollback:
    """Gives everything the state that the epoch began with: of its checkpoint or, if there is none, of memory.

    A whole model that is trained isn't copied: without a checkpoint of its start such an epoch is finished.
    """

    checkpoints: Checkpoints
    copy: dict[str, Any] | None = None  # the state at the epoch's start, where no checkpoint has it

    def may_stop(self) -> bool:
        """Whether to stop now, on all processes alike: a signal came, and there is a state to go back to."""
        return (self.checkpoints.saved or self.copy is not None) and self.checkpoints.stopper.agreed()

    @contextmanager
    def on_stop(self, keep: Callable[[], str]) -> Iterator[None]:
        """Go back and save if a signal comes inside.

        Before, `keep` keeps the epoch's rollouts and their scores: a resume repeats its optimizer steps alone.
        """
        checkpoints = self.checkpoints
        self.copy = None if checkpoints.saved or checkpoints.config.full_finetuning else self._copied()
        state = generators()  # as the rewards left them: an update may use them, for a LoRA's dropout
        try:
            yield
        except Stopped:
            said = keep()
            self._go_back()
            set_generators(state)
            checkpoints.save()
            checkpoints.say(said)
            raise
        finally:
            self.copy = None

    def _copied(self) -> dict[str, Any]:
        """Return the trained weights and all states, copied to the host, as a checkpoint has them on disk."""
        run = self.checkpoints
        states = {name: item.state_dict() for name, item in run.states.items()}
        weights = [parameter.detach() for parameter in run.policy.parameters]
        return on_host({"weights": weights, "states": states, "progress": run.progress.state_dict()})

    def _go_back(self) -> None:
        run = self.checkpoints
        if self.copy is None:
            run.load(run.newest)
        else:
            held, self.copy = self.copy, None
            for parameter, weight in zip(run.policy.parameters, held["weights"], strict=True):
                parameter.data.copy_(weight)
            for name, item in run.states.items():
                item.load_state_dict(held["states"][name])
            run.progress.load_state_dict(held["progress"])
        if run.accelerator.is_main_process:
            run.local_tracker.rewind(run.progress.epoch)


def on_host(value: Any) -> Any:
    """Return a copy of a nested state with its tensors on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: on_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_host(item) for item in value)
    return copy.deepcopy(value)
