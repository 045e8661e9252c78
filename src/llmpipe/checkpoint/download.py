"""hf://ORG/NAME@REV → a directory with the files that a model needs, each compared with what the hub says of it.

Files come into the user's Hugging Face cache, so that whole ones are fetched once, however often a download is killed;
weights are hard links of the cache's where both lie on one file system, copies elsewhere.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.carried import copy_hashed
from llmpipe.checkpoint.hub import CACHE, DEFAULT_REVISION, Counter, Repository, cached, fetch, look_up
from llmpipe.checkpoint.hub_choice import choose
from llmpipe.config import HUB, parse_hub
from llmpipe.errors import UserError
from llmpipe.files import atomic_directory, sha256
from llmpipe.progress import progress

WORKERS = 4
log = logging.getLogger(__name__)


def download(uri: str, output: Path, weights: str | None = None, include: Sequence[str] = ()) -> manifest.Manifest:
    """Fetch what a model needs; the manifest holds the commit, and the SHA-256 of every file.

    `weights` is one of `hub_choice.FORMATS`, None the first that is there; `include` are patterns of further files.
    UserError if the hub is not reached or does not allow it, and for a file that is not what the hub says.
    """
    manifest.check_replaceable(output)
    repository, revision = _found(uri)
    chosen = choose(repository, weights, include)
    _check_room(repository, chosen, output)
    with atomic_directory(output) as part:
        hashes = _fetch_all(repository, chosen, part)
        source = {"path": f"{HUB}{repository.name}", "revision": revision, "commit": repository.commit}
        return manifest.write(part, "download", source, hashes)


def plan(uri: str, output: Path, weights: str | None = None, include: Sequence[str] = ()) -> list[str]:
    """What `download` would fetch, in lines; only an index of weights is fetched for it."""
    repository, _ = _found(uri)
    chosen = choose(repository, weights, include)
    missing = _missing(repository, chosen)
    lines = [f"would make {output} of {HUB}{repository.name}@{repository.commit}"]
    for target, name in sorted(chosen.items()):
        lines.append(f"  {repository.files[name].size:>15,}  {target}{'' if name in missing else ', in the cache'}")
    return [*lines, f"would fetch {sum(missing.values()):,} bytes to {CACHE}"]


def _found(uri: str) -> tuple[Repository, str]:
    """The repository that is meant, and the revision."""
    name, revision = parse_hub(uri)
    _hub_lines_in_the_log()
    repository = look_up(name, revision)
    if revision:
        log.info("%s is commit %s", uri, repository.commit)
    else:
        at = f"{HUB}{name}@{repository.commit}"
        log.warning("%s names no revision: %s is taken, now %s", uri, DEFAULT_REVISION, at)
    return repository, revision or DEFAULT_REVISION


def _missing(repository: Repository, chosen: dict[str, str]) -> dict[str, int]:
    """The bytes of each file that is not in the cache."""
    return {name: repository.files[name].size for name in chosen.values() if not cached(repository, name)}


def _check_room(repository: Repository, chosen: dict[str, str], output: Path) -> None:
    """UserError before anything is fetched if a disk has too little room for it."""
    needed = {CACHE: sum(_missing(repository, chosen).values())}
    output.parent.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    if output.parent.stat().st_dev != CACHE.stat().st_dev:  # then weights are copied, not linked
        needed[output.parent] = sum(repository.files[name].size for name in chosen.values())
    for folder, size in needed.items():
        if (free := shutil.disk_usage(folder).free) < size:
            raise UserError(
                f"{HUB}{repository.name} takes {size:,} bytes in {folder}, and {free:,} are free there: make room, or"
                " name another place, for the cache with HF_HOME"
            )


def _hub_lines_in_the_log() -> None:
    """huggingface_hub's lines, as of a cut connection, go where ours go."""
    logger = logging.getLogger("huggingface_hub")
    logger.handlers.clear()
    logger.propagate = True


def _fetch_all(repository: Repository, chosen: dict[str, str], part: Path) -> dict[str, str | None]:
    """Fetch all files, a few at a time; returns the SHA-256 of each. One that fails stops the others."""
    total, stop = sum(repository.files[name].size for name in chosen.values()), Event()
    with progress(f"download {repository.name}", total, "B") as shown, ThreadPoolExecutor(WORKERS) as pool:
        jobs = {
            pool.submit(_fetch_one, repository, name, part / target, Counter(shown, target, stop)): target
            for target, name in chosen.items()
        }
        try:
            return {jobs[job]: job.result() for job in as_completed(jobs)}
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_one(repository: Repository, name: str, target: Path, counter: Counter) -> str:
    """Fetch a file, a second time if the first, or what lay in the cache, is damaged; returns its SHA-256."""
    file = repository.files[name]
    for again in (False, True):
        cached = fetch(repository, name, counter, again)
        digest = _lay(cached, target, link=file.sha256 is not None)
        counter.add(file.size - counter.seen)
        found, expected = (digest, file.sha256) if file.sha256 else (git_hash(target), file.git)
        if found == expected:
            return digest
        target.unlink()
        log.warning("%s in the cache is damaged%s", name, "" if again else ": fetching it again")
    raise UserError(
        f"{HUB}{repository.name}: {name} is damaged: it has the {'SHA-256' if file.sha256 else 'git hash'} {found},"
        f" the hub says {expected}: it was changed on the way, or on the hub; try again, or another revision"
    )


def _lay(cached: Path, target: Path, link: bool) -> str:
    """Put a file of the cache in its place; returns its SHA-256. Small ones, which people edit, are always copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(cached.resolve(), target)
            return sha256(target)
        except OSError:  # another file system, one without hard links, or another user's cache
            pass
    return copy_hashed(cached, target)


def git_hash(path: Path) -> str:
    """git's name of a file's contents: SHA-1 over a header with the size, and the bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
