"""TRL's closing lines on a trainer: save, write the card, push."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_tafs.hub.options import PublishingOptions
from trl_tafs.hub.publisher import Publisher


class ClosingLines:
    """`save_model`, `create_model_card` and `push_to_hub`, with the arguments of TRL's and transformers' trainers.

    Every process may call each; the main one writes and pushes.
    """

    config: PublishingOptions
    publisher: Publisher

    def save_pretrained(self, save_directory: str | os.PathLike | None = None, *, repo_id: str | None = None) -> Path:
        """Write the adapter as plain diffusers loads it, with scheduler, model card and pictures.

        By default to `<run>/adapter`.
        """
        return self.publisher.save(save_directory, repo_id)

    def save_model(self, output_dir: str | os.PathLike | None = None) -> Path:
        """As `save_pretrained`, by transformers' name."""
        return self.save_pretrained(output_dir)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        *,
        path: str | os.PathLike | None = None,
        repo_id: str | None = None,
    ) -> Path | None:
        """Write README.md and training settings; None on all but the main process.

        Args:
            model_name: the card's title; by default the repository's name, or the base model's.
            dataset_name: the Hub's dataset or datasets that the prompts are of, for the card's metadata and text.
            tags: beside the trainer's and the family's.
            path: a folder, by default `<run>/adapter`.
            repo_id: where the adapter is going, for the card's code.

        Raises:
            ValueError: a name that no dataset on the Hub can have.
        """
        self.publisher.name_card(model_name, dataset_name, tags)
        return self.publisher.write_card(path, repo_id)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        branch: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> Any:
        """Save, then push the adapter to `repo_id` (by default `hub_model_id`, or the run's name below your user's).

        Args:
            repo_id: 'user/name', or 'name' for the token's owner; made if missing.
            commit_message: of the commit.
            blocking: False returns a future at once, and uploads in the background.
            token: one with the right to write; the stored one if None.
            revision: a branch instead of main, made if missing.
            branch: another name for `revision`.
            private: of a repository that is made; None: `hub_private_repo`.
            create_pr: open a pull request instead of committing.
            model_name: see `create_model_card`.
            dataset_name: likewise.
            tags: likewise.

        Returns:
            huggingface_hub's `CommitInfo`, or a future of it; None on all but the main process.

        Raises:
            ValueError: arguments that contradict each other, or a name that nothing on the Hub can have.
            PushError: the Hub or the network refuses; the adapter is saved by then.
        """
        if branch is not None and revision not in (None, branch):
            raise ValueError(f"branch is {branch!r} and revision {revision!r}, which are one thing; give one of them")
        self.publisher.name_card(model_name, dataset_name, tags)
        return self.publisher.push(
            repo_id,
            token,
            self.config.hub_private_repo if private is None else private,
            commit_message=commit_message,
            revision=revision or branch,
            create_pr=create_pr,
            blocking=blocking,
        )
