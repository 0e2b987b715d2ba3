"""`Checkpoints`: save a run, resume it, set earlier ones aside, keep the best weights."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.resuming import check_resumes
from trl_tafs.processes import same_everywhere
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.training import checkpoint_files as files
from trl_tafs.training.divergence import check_weights, left_over
from trl_tafs.training.logs import Stopwatch, warn_main
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.progress import Progress
from trl_tafs.training.settings import changes
from trl_tafs.training.stopping import Stopped, Stopper
from trl_tafs.training.trackers import LocalTracker

WORTH = 20  # times the seconds of writing a checkpoint lie between two: at most 5% of a run is spent on them


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
    written: float = 0.0  # when it was, by the monotonic clock
    took: float = 0.0  # seconds

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return Path(self.config.project_dir) / "checkpoints"

    @property
    def states(self) -> dict[str, Any]:
        """Everything that moves besides the weights, by name."""
        return self.policy.states() | self.other_states

    def save(self) -> Path | None:
        """Write a checkpoint of everything that moves, at the end of an epoch; None where the disk failed.

        Raises:
            NonFiniteError: a trained weight isn't finite; what was written before stays.
        """
        check_weights(self.policy, self.config, f"after {self.progress.epoch} epochs")

        def write(path: Path) -> None:
            files.save_generators(path, self.accelerator.process_index)
            if self.accelerator.is_main_process:
                self.policy.save(path)
                files.save_states(path, self.states)
                files.write_state(path, {"progress": self.progress.state_dict(), "settings": self.settings})

        limit = self.config.project_kwargs.get("total_limit") or self.config.num_checkpoint_limit
        start = time.monotonic()
        with self.stopwatch("save"):
            path = files.write_checkpoint(self.folder, self.progress.epoch, self.accelerator, write, limit)
        self.written = time.monotonic()
        self.took = self.written - start
        self.newest, self.failed = path or self.newest, path is None
        return path

    @property
    def saved(self) -> bool:
        """Whether the state that the epoch began with is on disk."""
        return self.newest is not None and files.epoch_of(self.newest) == self.progress.epoch

    def due(self, epoch: int) -> bool:
        """Return whether to save when `epoch` epochs are done; not while the last optimizer steps were left out.

        Those checkpoints would have the weights of an earlier one, and push those out that a diverged run goes back to.
        One that could not be written is due again at the next epoch's end. Without a `save_freq` it is due once the
        last one is older than `WORTH` times what it took to write: by the main process's clock, on all alike.
        """
        if self.progress.skipped_steps or self.config.save_freq == 0:
            return False
        if self.config.save_freq is not None:
            return epoch % self.config.save_freq == 0 or self.failed
        return same_everywhere(self.accelerator, time.monotonic() - self.written >= WORTH * self.took)

    def save_last(self) -> None:
        """Save, unless the newest checkpoint is of this epoch; go no further if a signal came."""
        if not self.saved:
            self.save()
        if self.stopper.agreed():
            self.say("The adapter isn't written yet")
            raise Stopped

    # Interrupted ----------------------------------------------------------------------------------------------

    @contextmanager
    def saved_on_failure(self, *, repeated: bool = False) -> Iterator[None]:
        """Save the epochs before this one if a reward fails or a signal comes inside, where nothing is trained.

        Where the weights draw NaN nothing is saved, and the error says which checkpoints there are.

        If a resume repeats all of it, it begins with the same global generators; else it goes on with what was kept.
        """
        generators = files.generators()
        try:
            yield
        except (RewardError, Stopped) as stopped:
            if repeated:
                files.set_generators(generators)
            self.save()
            self.say(str(stopped))
            raise
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {left_over(self.config)}") from error

    def say(self, more: str) -> None:
        """Tell the stopper what is saved, for its last message."""
        where = f"checkpoint {self.newest} is saved" if self.saved else "no checkpoint could be written"
        self.stopper.saved = f"{where}. {more}".removesuffix(". ").removesuffix(".")

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
        settings = self.load(path)
        files.load_generators(path, self.accelerator.process_index)
        if changed := changes(settings, self.settings):
            warn_main(self.accelerator, f"resumed with other settings than the checkpoint's: {'; '.join(changed)}")
        if self.accelerator.is_main_process:
            files.set_aside_after(self.config.project_dir, self.progress.epoch)
            self.local_tracker.rewind(self.progress.epoch)
        self.newest = path if path.parent.resolve() == self.folder.resolve() else None
        self.accelerator.print(f"resumed from {path}: epoch {self.progress.epoch}, step {self.progress.global_step}")

    def load(self, path: Path) -> dict[str, Any]:
        """Take over a checkpoint's weights and states; return the settings that it was made with."""
        state = files.read_state(path)
        try:
            check_resumes(self.policy, path, state["settings"])
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # of other settings, or of a foreign file
            named = str(error) if str(path) in str(error) else f"checkpoint {path}: {first_line(error)}"
            raise files.CheckpointError(named) from error
        with files.reading(path, "the trained weights"):
            self.policy.load(path)
        files.load_states(path, self.states)
        with files.reading(path, files.STATE):
            self.progress.load_state_dict(state["progress"])
            self.policy.apply_settings()
        return state["settings"]

    def save_best(self, epoch: int, name: str, value: float) -> None:
        """Keep the weights of the best evaluation apart, in `best/`.

        Raises:
            NonFiniteError: a trained weight isn't finite; the best so far stays.
        """
        check_weights(self.policy, self.config, f"after {epoch} epochs")
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.config.project_dir) / "best"
        with tolerating_disk_faults(f"the best adapter, {folder},"):
            with self.policy.averaged():
                self.policy.publish(folder)
            write_whole(folder / "best.json", json.dumps({"epoch": epoch, "metric": name, "value": value}))
