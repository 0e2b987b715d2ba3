"""`trl-tafs doctor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from trl_tafs.cli.arguments import parse_arguments
from trl_tafs.cli.command import CommandOptions
from trl_tafs.cli.train import make_trainer


@dataclass
class DoctorOptions(CommandOptions):
    """Where the report goes beside the terminal."""

    title: ClassVar[str] = "Doctor"

    json: str | None = field(default=None, metadata={"help": "A file for the report, for a machine."})


def doctor(argv: Sequence[str]) -> Callable[[], int]:
    """Try one rollout and one update, and say what is wrong; takes the arguments of `train`, and --json FILE."""
    from trl_tafs.training.launch import check_launch

    told = {"prog": "trl-tafs doctor", "epilog": "The exit code is 1 if the run can't train so."}
    arguments, config, options = parse_arguments(argv, [DoctorOptions], description=doctor.__doc__, **told)
    check_launch(config)
    folder = TemporaryDirectory(prefix="trl-tafs-doctor-")
    keep_away(config, folder.name)
    trainer = make_trainer(arguments, config)

    def examine() -> int:
        with folder:
            report = trainer.doctor()
        if trainer.accelerator.is_main_process:
            print(report)
            if options.json is not None:
                Path(options.json).write_text(report.to_json() + "\n", encoding="utf-8")
        return 0 if report.healthy else 1

    return examine


def keep_away(config: Any, folder: str) -> None:
    """Let the trainer of this configuration touch nothing of the run's: its folder, its trackers, its repository."""
    if config.resume_from:
        from trl_tafs.training.checkpoint_files import find_checkpoint

        config.resume_from = str(find_checkpoint(config.resume_from, Path(config.project_dir) / "checkpoints"))
    config.project_kwargs = {"project_dir": folder}
    config.log_with, config.tracker_kwargs, config.push_to_hub = None, {}, False
