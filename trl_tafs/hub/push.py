"""Push a folder to the Hub, with errors that name the repository, the reason and the remedy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_tafs.output.errors import first_line
from trl_tafs.output.secrets import remember
from trl_tafs.policy.adapter_file import SCHEDULER_FILE, WEIGHT_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi


# Everything that is pushed: whatever else lies in the folder (checkpoints, logs) stays on the machine.
PUSHED = (WEIGHT_NAME, "transformer/*", SCHEDULER_FILE, "README.md", "training_settings.json", "images/*.png")


class PushError(RuntimeError):
    """A push that failed; the message names the repository, the reason, the remedy, and where the work is."""


def prepare_repo(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository if it is missing, and return its whole name, 'user/name', which the card's code needs.

    Raises:
        PushError: there is no token, or it may not write there. Call it before training, to learn that in time.
    """
    api = _api(repo_id, token)
    with push_errors(repo_id):
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push what `save_adapter` and `write_model_card` wrote, the files of `PUSHED` alone; the folder is left as it is.

    Args:
        folder: where the adapter lies.
        repo_id: 'user/name', or 'name' for the token's owner; made if missing.
        private: of a repository that is made; None is the owner's default.
        token: one with the right to write; the stored one if None.
        commit_message: of the commit; None: one of ours.
        revision: a branch instead of main, made if missing.
        create_pr: open a pull request with the commit, which needs no right to write; to `revision`, which is there.

    Raises:
        FileNotFoundError: no adapter in the folder.
        PushError: there is no token, or the Hub or the network refuses.
    """
    folder = Path(folder)
    if not (folder / WEIGHT_NAME).is_file() and not (folder / "transformer").is_dir():
        raise FileNotFoundError(f"nothing to push to {repo_id!r}: no {WEIGHT_NAME} in {folder}; save it first")
    later = kept(folder, repo_id, private=private, revision=revision)
    api = _api(repo_id, token, later)
    with push_errors(repo_id, later):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        given = {"commit_message": commit_message or "Upload a TAFS-GRPO adapter", "revision": revision}
        given["create_pr"] = create_pr or None
        return api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(PUSHED), **given)


def push_command(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """Return the command line of huggingface_hub that pushes a folder as `push_folder` does."""
    words = ["hf", "upload", repo_id, str(Path(folder).resolve()), "."]
    words += [word for pattern in PUSHED for word in ("--include", pattern)]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def kept(folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Return, in words, where the adapter is after a push that failed, and the command that pushes it later."""
    command = push_command(folder, repo_id, private=private, revision=revision)
    return f". Nothing is lost, the adapter is in {Path(folder).resolve()}; push it later with\n  {command}"


def push_in_background(folder: str | os.PathLike, repo_id: str, **options: Any) -> Future[CommitInfo]:
    """As `push_folder`, in a thread: its result, or its error, is the future's. The process waits for it at its end."""
    from huggingface_hub import HfApi

    return HfApi().run_as_future(push_folder, folder, repo_id, **options)


def _api(repo_id: str, token: str | None, kept: str = "") -> HfApi:
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    remember(token)
    if token is None:
        raise PushError(f"no token to push to {repo_id!r} with: run `hf auth login`, or set HF_TOKEN{kept}")
    return HfApi(token=token)


_REMEDIES = {
    401: "the token isn't valid: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: use one with write access, or a repository of your own",
    404: "check the name, and that the token may see it",
}


@contextmanager
def push_errors(repo_id: str, kept: str = "") -> Iterator[None]:
    """Turn whatever the Hub or the network answers inside into a PushError, with the remedy and where the work is."""
    try:
        yield
    except Exception as error:  # HTTP, transport, LFS and validation errors share no base class
        cause = _cause(error)
        status = getattr(getattr(cause, "response", None), "status_code", None)
        remedy = _REMEDIES.get(status, "the push can be made again")
        raise PushError(f"no push to {repo_id!r}: {first_line(cause)}; {remedy}{kept}") from error


def _cause(error: BaseException) -> BaseException:
    """Return the answer of the Hub behind an error, which LFS uploads wrap in a RuntimeError."""
    return error if error.__cause__ is None or hasattr(error, "response") else _cause(error.__cause__)
