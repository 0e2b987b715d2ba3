"""Names of repositories on the Hub."""

from __future__ import annotations

from trl_tafs.output.errors import shown


def check_repo_id(repo_id: str, what: str) -> None:
    """Raise ValueError if nothing on the Hub can have that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{what} is {shown(repo_id)}, which is no name on the Hub: 'user/name' or 'name', of letters, digits, '-', "
            "'_' and '.', at most 96, with no '-' or '.' at the ends; choose another"
        ) from error
