"""`Checkpoints`: save a run, resume it, roll it back, set earlier ones aside, keep the best weights."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.policy.policy import Policy
from trl_tafs.processes import same_everywhere
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.training import checkpoint_files as files
from trl_tafs.training.logs import Stopwatch, warn_main
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.progress import Progress
from trl_tafs.training.settings import changes
from trl_tafs.training.stopping import Stopped, Stopper
from trl_tafs.training.trackers import LocalTracker


@dataclass
class Checkpoints:
    """The checkpoints of one run, with all that they hold."""

    config: TrainingOptions
    accelerator: Accelerator
    policy: Policy
    progress: Progress
    other_states: dict[str, Any]  # beside the policy's, by name: objects with `state_dict` and `load_state_dict`
    settings: dict[str, Any]  # resolved
    local_tracker: LocalTracker
    stopwatch: Stopwatch
    stopper: Stopper
    newest: Path | None = None  # the one that this run wrote or resumed from last
    failed: bool = False  # the last one could not be written
    copy: bytes | None = None  # the state at the epoch's start, in memory, where no checkpoint has it

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return Path(self.config.project_dir) / "checkpoints"

    @property
    def states(self) -> dict[str, Any]:
        """Everything that moves besides the weights, by name."""
        return self.policy.states() | self.other_states

    def save(self) -> Path | None:
        """Write a checkpoint of everything that moves, at the end of an epoch; None where the disk failed."""

        def write(path: Path) -> None:
            files.save_generators(path, self.accelerator.process_index)
            if self.accelerator.is_main_process:
                self.policy.save(path)
                files.save_states(path, self.states)
                files.write_state(path, {"progress": self.progress.state_dict(), "settings": self.settings})

        limit = self.config.project_kwargs.get("total_limit") or self.config.num_checkpoint_limit
        with self.stopwatch("save"):
            path = files.write_checkpoint(self.folder, self.progress.epoch, self.accelerator, write, limit)
        self.newest, self.failed = path or self.newest, path is None
        return path

    def due(self, epoch: int) -> bool:
        """Return whether one is to be written after so many epochs: every `save_freq`, and after one that failed."""
        return bool(self.config.save_freq) and (epoch % self.config.save_freq == 0 or self.failed)

    @property
    def saved(self) -> bool:
        """Whether the state that the epoch began with is on disk."""
        return self.newest is not None and files.epoch_of(self.newest) == self.progress.epoch

    def save_last(self) -> None:
        """Save, unless the newest checkpoint is of this epoch."""
        if not self.saved:
            self.save()

    # Interrupted ----------------------------------------------------------------------------------------------

    @contextmanager
    def saved_on_failure(self, *, repeated: bool = False) -> Iterator[None]:
        """Save the epochs before this one if a reward fails or a signal comes inside, where nothing is trained.

        If a resume repeats all of it, it begins with the same global generators; else it goes on with what was kept.
        """
        generators = files.generators()
        try:
            yield
        except (RewardError, Stopped) as stopped:
            if repeated:
                files.set_generators(generators)
            self.save()
            self._say(str(stopped))
            raise

    @contextmanager
    def rolled_back_on_stop(self, keep: Callable[[], str]) -> Iterator[None]:
        """Give everything the state that the epoch began with if a signal comes inside, where weights are trained.

        The epoch's rollouts, scored, are kept by `keep`: a resume repeats its optimizer steps alone.
        """
        self.copy = None if self.saved or self.config.full_finetuning else self._copied()
        generators = files.generators()  # as the rewards left them: an update may use them, for a LoRA's dropout
        try:
            yield
        except Stopped:
            said = keep()
            self._roll_back()
            files.set_generators(generators)
            self.save()
            self._say(said)
            raise
        finally:
            self.copy = None

    def may_stop(self) -> bool:
        """Whether to stop while weights are trained: on a signal, unless a whole model would have to be copied for it.

        Then the epoch is finished first.
        """
        return (self.saved or self.copy is not None) and self.stopper.agreed()

    def _say(self, more: str) -> None:
        where = f"checkpoint {self.newest} is saved" if self.saved else "no checkpoint could be written"
        self.stopper.saved = f"{where}. {more}".removesuffix(". ").removesuffix(".")

    def _copied(self) -> bytes:
        """Return the trained weights and all states in memory, as a checkpoint has them on disk."""
        buffer = io.BytesIO()
        states = {name: item.state_dict() for name, item in self.states.items()}
        weights = [parameter.detach() for parameter in self.policy.parameters]
        torch.save({"weights": weights, "states": states, "progress": self.progress.state_dict()}, buffer)
        return buffer.getvalue()

    def _roll_back(self) -> None:
        if self.copy is None:
            self._load(self.newest)
        else:
            held = torch.load(io.BytesIO(self.copy), map_location="cpu", weights_only=True)
            for parameter, weight in zip(self.policy.parameters, held["weights"], strict=True):
                parameter.data.copy_(weight)
            for name, item in self.states.items():
                item.load_state_dict(held["states"][name])
            self.progress.load_state_dict(held["progress"])
        if self.accelerator.is_main_process:
            self.local_tracker.rewind(self.progress.epoch)

    # Resuming -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Resume from `resume_from`, or set aside what an earlier run left in the folder.

        Raises:
            CheckpointError: there is no such checkpoint, or it isn't whole, or is of a run with other states.
        """
        path = self._found() if self.config.resume_from else None
        if path is not None:
            self._resume(path)
            return
        if self.accelerator.is_main_process:
            earlier = files.set_aside(self.config.project_dir)
            if earlier is not None:
                folder = self.config.project_dir
                warnings.warn(f"{folder} holds an earlier run, resume_from is empty; moved to {earlier}", stacklevel=4)
        self.accelerator.wait_for_everyone()

    def _found(self) -> Path | None:
        """Return the checkpoint to resume from, which the main process has read and found whole."""
        path, fault = None, None
        if self.accelerator.is_main_process:
            try:
                path = files.find_checkpoint(self.config.resume_from, self.folder)
            except files.CheckpointError as error:
                fault = error
        path, said = same_everywhere(self.accelerator, (path, fault and str(fault)))
        if said is not None:
            raise files.CheckpointError(said) from fault
        if path is None:
            self.accelerator.print(f"resume_from='auto': no checkpoint below {self.folder}, a new run begins")
        return path

    def _resume(self, path: Path) -> None:
        settings = self._load(path)
        files.load_generators(path, self.accelerator.process_index)
        if changed := changes(settings, self.settings):
            warn_main(self.accelerator, f"resumed with other settings than the checkpoint's: {'; '.join(changed)}")
        if self.accelerator.is_main_process:
            files.set_aside_after(self.config.project_dir, self.progress.epoch)
            self.local_tracker.rewind(self.progress.epoch)
        self.newest = path if path.parent.resolve() == self.folder.resolve() else None
        self.accelerator.print(f"resumed from {path}: epoch {self.progress.epoch}, step {self.progress.global_step}")

    def _load(self, path: Path) -> dict[str, Any]:
        """Take over a checkpoint's weights and states; return the settings that it was made with."""
        state = files.read_state(path)
        with files.reading(path, "the trained weights"):
            self.policy.load(path)
        files.load_states(path, self.states)
        with files.reading(path, files.STATE):
            self.progress.load_state_dict(state["progress"])
            self.policy.apply_settings()
        return state["settings"]

    def save_best(self, epoch: int, name: str, value: float) -> None:
        """Keep the weights of the best evaluation apart, in `best/`."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.config.project_dir) / "best"
        with tolerating_disk_faults(f"the best adapter, {folder},"):
            with self.policy.averaged():
                self.policy.save(folder)
            write_whole(folder / "best.json", json.dumps({"epoch": epoch, "metric": name, "value": value}))
