"""The options of publishing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.hub.names import check_repo_id
from trl_tafs.options import Options, check_not_empty, option
from trl_tafs.training.options import TrainingOptions


@dataclass
class HubOptions(Options):
    """Whether and where the adapter is pushed."""

    title: ClassVar[str] = "Hub"

    push_to_hub: bool = option(False, "Push the adapter when training ends.")
    hub_model_id: str | None = option(None, "Repository to push to; None: `run_name` below your user name.")
    hub_private_repo: bool | None = option(None, "Create it as a private one.")

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_not_empty(self, "hub_model_id")


@dataclass
class PublishingOptions(HubOptions, TrainingOptions):
    """All that the publication of a run is made from."""

    def check(self) -> None:
        """Raise ValueError for what can't work together."""
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")
        elif self.push_to_hub:
            check_repo_id(self.run_name, "run_name, the repository's name without a hub_model_id,")
