"""Back to where an epoch began, if a signal comes while its weights are trained."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trl_tafs.training.checkpoint import Checkpoints
from trl_tafs.training.checkpoint_files import generators, set_generators
from trl_tafs.training.stopping import Stopped


@dataclass
class Rollback:
    """Gives everything the state that the epoch began with: of its checkpoint or, if there is none, of memory.

    A whole model that is trained isn't copied: without a checkpoint of its start such an epoch is finished.
    """

    checkpoints: Checkpoints
    copy: bytes | None = None  # the state at the epoch's start, where no checkpoint has it

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

    def _copied(self) -> bytes:
        """Return the trained weights and all states in memory, as a checkpoint has them on disk."""
        buffer, run = io.BytesIO(), self.checkpoints
        states = {name: item.state_dict() for name, item in run.states.items()}
        weights = [parameter.detach() for parameter in run.policy.parameters]
        torch.save({"weights": weights, "states": states, "progress": run.progress.state_dict()}, buffer)
        return buffer.getvalue()

    def _go_back(self) -> None:
        run = self.checkpoints
        if self.copy is None:
            run.load(run.newest)
        else:
            held = torch.load(io.BytesIO(self.copy), map_location="cpu", weights_only=True)
            for parameter, weight in zip(run.policy.parameters, held["weights"], strict=True):
                parameter.data.copy_(weight)
            for name, item in run.states.items():
                item.load_state_dict(held["states"][name])
            run.progress.load_state_dict(held["progress"])
        if run.accelerator.is_main_process:
            run.local_tracker.rewind(run.progress.epoch)
