"""A finished directory → a repository on the Hugging Face hub, by huggingface_hub, with the user's own token.

A repository that is not there is made, a private one: whether the world may see the weights is its owner's decision, on
the hub's page. What was sent is not sent again: an upload that broke off is taken up by the next one.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's: hub's version decides
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError

log = logging.getLogger(__name__)

_LOG_IN = "run `hf auth login`, or set HF_TOKEN, with a token that may write"


def check_may_upload(repository: str) -> None:
    """UserError, before hours of work, for what the hub would refuse: the name, no token, a token that reads only."""
    if repository.count("/") != 1:
        raise UserError(f"--push-to-hub {repository}: a repository is named ORG/NAME or USER/NAME")
    if get_token() is None:
        raise UserError(f"--push-to-hub {repository}: no token was found: {_LOG_IN} ({_tokens_page()})")
    with _explained(repository):
        validate_repo_id(repository)
        role = HfApi().whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"--push-to-hub {repository}: your token may read only: {_LOG_IN} ({_tokens_page()})")


def upload(directory: Path, repository: str) -> str:
    """Upload every file of a finished directory; returns its page. The repository's other files stay."""
    made = manifest.read(directory)
    names = [*made.files, manifest.NAME]
    if not sys.stderr.isatty():
        disable_progress_bars()
    total, page = sum(entry["bytes"] for entry in made.files.values()), f"{constants.ENDPOINT}/{repository}"
    log.info("uploading %s to %s: %d files, %s bytes", directory, page, len(names), f"{total:,}")
    with _explained(repository):
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        message = f"Upload of llmpipe {made.version}: {made.digest[:12]}"
        patterns = [escape(name) for name in names]
        api.upload_folder(repo_id=repository, folder_path=directory, allow_patterns=patterns, commit_message=message)
        there = [file.rfilename for file in api.model_info(repository).siblings or []]
    if others := sorted(set(there) - {*names, ".gitattributes"}):
        log.warning("%s holds other files, too, and these stay: %s", page, ", ".join(others[:8]))
    log.info("uploaded: %s", page)
    return page


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of huggingface_hub as UserErrors; a disk's own are left as they are."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository}: a repository is named ORG/NAME or USER/NAME: {error}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # hf_xet's are RuntimeErrors
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"--push-to-hub {repository}: {_told(error)}") from error


def _told(error: Exception) -> str:
    hub, said = constants.ENDPOINT, str(error).partition("\n")[0]
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__  # a file's failure stands behind its name
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the hub: unset it"
    if status == 401:
        return f"{hub} refuses the token: {_LOG_IN} ({_tokens_page()})"
    if status == 403:
        return f"your token may not write there: ask its owner to let you, or {_LOG_IN} ({_tokens_page()})"
    if status:
        return f"{hub} answers {status} ({said}): run this again later; what was uploaded is not sent again"
    return (
        f"{hub} is not reached, or the connection broke ({said}): run this again where the hub is reached (HF_ENDPOINT"
        " names another); what was uploaded is not sent again"
    )


def _tokens_page() -> str:
    return f"{constants.ENDPOINT}/settings/tokens"
