"""`Checkpoints`: save a run, resume it, set earlier ones aside, keep the best weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trl_tafs.output.files import tolerating_disk_faults, write_whole
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.policy.policy import Policy
from trl_tafs.policy.resuming import check_resumes
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.training import checkpoint_files as files
from trl_tafs.training.divergence import check_weights, left_over
from trl_tafs.training.logs import Stopwatch, warn_main
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.progress import Progress
from trl_tafs.training.settings import changes
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
        with self.stopwatch("save"):
            return files.write_checkpoint(self.folder, self.progress.epoch, self.accelerator, write, limit)

    def due(self, epoch: int) -> bool:
        """Return whether to save when `epoch` epochs are done; not while the last optimizer steps were left out.

        Those checkpoints would have the weights of an earlier one, and push those out that a diverged run goes back to.
        """
        return bool(self.config.save_freq) and epoch % self.config.save_freq == 0 and not self.progress.skipped_steps

    def save_last(self) -> None:
        """Save, unless the newest checkpoint is of this epoch."""
        done = files.checkpoints(self.folder)
        if not done or files.epoch_of(done[-1]) != self.progress.epoch:
            self.save()

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Save the epochs before this one if a reward fails inside: the failure costs this epoch's scores alone.

        Where the weights draw NaN nothing is saved, and the error says which checkpoints there are.
        """
        try:
            yield
        except RewardError:
            self.save()
            raise
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {left_over(self.config)}") from error

    def begin(self) -> None:
        """Resume from `resume_from`, or set aside what an earlier run left in the folder.

        Raises:
            CheckpointError: there is no such checkpoint, or it isn't whole, or is of a run with other states.
        """
        if self.config.resume_from:
            self._resume()
            return
        if self.accelerator.is_main_process:
            earlier = files.set_aside(self.config.project_dir)
            if earlier is not None:
                folder = self.config.project_dir
                warnings.warn(f"{folder} holds an earlier run, resume_from is empty; moved to {earlier}", stacklevel=4)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        path = files.find_checkpoint(self.config.resume_from, self.folder)
        state = files.read_state(path)
        check_resumes(self.policy, path, state["settings"])
        self.policy.load(path)
        files.load_states(path, self.states)
        files.load_generators(path, self.accelerator.process_index)
        self.policy.apply_settings()
        self.progress.load_state_dict(state["progress"])
        if changed := changes(state["settings"], self.settings):
            warn_main(self.accelerator, f"resumed with other settings than the checkpoint's: {'; '.join(changed)}")
        if self.accelerator.is_main_process:
            files.set_aside_after(self.config.project_dir, self.progress.epoch)
            self.local_tracker.rewind(self.progress.epoch)
        self.accelerator.print(f"resumed from {path}: epoch {self.progress.epoch}, step {self.progress.global_step}")

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
