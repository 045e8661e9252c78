"""A model's repository on the Hugging Face hub: what it holds, and its files, brought into the user's cache.

huggingface_hub does both: it finds the user's token (HF_TOKEN, `hf auth login`), cache (HF_HOME, HF_HUB_CACHE) and
endpoint (HF_ENDPOINT), and goes on where a connection was cut. Here its errors become ones that say what to do.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's: hub's version decides
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmpipe.errors import UserError
from llmpipe.progress import Progress

WAITS = (5, 30, 120)
"""Seconds before a file is asked for again, after huggingface_hub has given it up."""
DEFAULT_REVISION = constants.DEFAULT_REVISION
CACHE = Path(constants.HF_HUB_CACHE)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubFile:
    """What the hub says of a file."""

    size: int
    sha256: str | None
    """Of a file in LFS, as weights are."""
    git: str
    """git's own SHA-1 of a file outside LFS, see `git_hash`."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model's repository at one commit."""

    name: str
    commit: str
    files: dict[str, HubFile]


def look_up(name: str, revision: str | None) -> Repository:
    """One request: the commit that a revision (a branch, a tag; None: the default branch) is now, and its files."""
    with _explained(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision or DEFAULT_REVISION, files_metadata=True)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(_no_hub(name)) from error
    files = {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or "")
        for file in info.siblings or []
    }
    if not info.sha:
        raise UserError(_no_hub(name))
    return Repository(name, info.sha, files)


def cached(repository: Repository, name: str) -> bool:
    """Whether a file is in the cache; whether it is whole and right shows when it is read."""
    return isinstance(try_to_load_from_cache(repository.name, name, revision=repository.commit), str)


class Counter:
    """Adds a file's bytes to the shared progress; what huggingface_hub takes for its progress bar is `bar`."""

    def __init__(self, shown: Progress, name: str, stop: Event):
        self.shown, self.name, self.stop, self.seen = shown, name, stop, 0

    def add(self, count: int) -> None:
        """`count` more bytes have come; stops the file's thread when the others are to stop."""
        if self.stop.is_set():
            raise InterruptedError(f"{self.name}: stopped")
        self.seen += count
        self.shown.add(count, self.name)

    def bar(self) -> type:
        """A class with the methods of tqdm that huggingface_hub calls, one object for each attempt."""
        counter = self

        class Bar:
            def __init__(self, **_: Any):
                counter.add(-counter.seen)

            def __enter__(self) -> "Bar":
                return self

            def __exit__(self, *_: object) -> None: ...

            def update(self, count: float | None = 1) -> None:
                counter.add(int(count or 0))

            def update_transfer(self, count: float | None = 1) -> None: ...

            def set_postfix_str(self, *_: object, **__: object) -> None: ...

            set_transfer_postfix_str = set_postfix_str

        return Bar


def fetch(repository: Repository, name: str, counter: Counter | None = None, again: bool = False) -> Path:
    """The file in the user's cache, fetched if it is not there whole; `again`: fetched in any case."""
    options: dict[str, Any] = {"tqdm_class": counter.bar()} if counter else {}
    stop = counter.stop if counter else Event()
    for wait in (*WAITS, None):
        try:
            with _explained(repository.name, repository.commit, name):
                return Path(
                    hf_hub_download(repository.name, name, revision=repository.commit, force_download=again, **options)
                )
        except UserError as error:
            if wait is None or stop.is_set() or not _may_pass(error.__cause__):
                raise
            log.warning("%s; trying again in %d s", error, wait)
            stop.wait(wait)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def _explained(name: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Errors of huggingface_hub as UserErrors; a disk's own are left as they are."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"hf://{name} names no repository of the Hugging Face hub: {error}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet's are RuntimeErrors
        if isinstance(error, InterruptedError) or (isinstance(error, OSError) and error.errno):
            raise
        cause = _cause(error)
        raise UserError(_told(cause, name, revision, file)) from cause


def _cause(error: Exception) -> Exception:
    """Where huggingface_hub looked for a file in the cache because the hub failed it: what the hub said."""
    inner = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    return inner if isinstance(inner, Exception) else error


def _may_pass(cause: BaseException | None) -> bool:
    """Whether a later attempt may go well: the network, an overloaded hub."""
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    return not isinstance(cause, OfflineModeIsEnabled | FileMetadataError)


def _no_hub(name: str) -> str:
    return (
        f"{constants.ENDPOINT} does not answer on {name} as a hub does: HF_ENDPOINT has to be a hub's address, or unset"
    )


def _told(error: Exception, name: str, revision: str | None, file: str | None) -> str:
    page, what = f"{constants.ENDPOINT}/{name}", f"hf://{name}" + (f": {file}" if file else "")
    token = "your token is not allowed to" if get_token() else "no token was found"
    log_in = "run `hf auth login` or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        folder = Path(CACHE, f"models--{name.replace('/', '--')}", "snapshots")
        return (
            f"{what}: HF_HUB_OFFLINE forbids to ask the hub: unset it, or name a folder that is there already, as those"
            f" in {folder} are, instead of hf://"
        )
    if isinstance(error, GatedRepoError):
        return f"{what} is gated, and {token}: ask for access on {page}, then {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{what} has no revision {revision!r}: its branches, tags and commits are on {page}/tree/main"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what} is not there or private, and {token}: compare the name with {page}; for a private one {log_in}"
    if status in (401, 403):
        return f"{what}: {constants.ENDPOINT} refuses the token: {log_in} anew"
    if status:
        return f"{what}: {constants.ENDPOINT} answers {status}: run this again later; whole files are kept"
    return (
        f"{what}: {constants.ENDPOINT} is not reached, or the connection broke ({error}): run this again where the hub"
        f" is reached (HF_ENDPOINT names another); whole files are kept in {CACHE}"
    )
