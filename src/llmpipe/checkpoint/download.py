"""hf://ORG/NAME@REV → a directory with the files that a model needs, each compared with what the hub says of it.

Files come into the user's Hugging Face cache, so that whole ones are fetched once, however often a download is killed;
weights are hard links of the cache's where both lie on one file system, copies elsewhere.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from threading import Event

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.carried import copy_hashed, goes_along
from llmpipe.checkpoint.hub import DEFAULT_REVISION, Counter, Repository, fetch, look_up
from llmpipe.config import HUB, parse_hub
from llmpipe.errors import UserError
from llmpipe.files import atomic_directory, read_json, sha256
from llmpipe.progress import progress

FORMATS = ("safetensors", "bin", "meta")
"""Of weights, in the order of preference."""
WORKERS = 4
log = logging.getLogger(__name__)


def download(uri: str, output: Path, weights: str | None = None, include: Sequence[str] = ()) -> manifest.Manifest:
    """Fetch what a model needs; the manifest holds the commit, and the SHA-256 of every file.

    `weights` is one of FORMATS, None the first that is there; `include` are patterns of further files. UserError if
    the hub is not reached or does not allow it, and for a file that is not what the hub says.
    """
    name, revision = parse_hub(uri)
    manifest.check_replaceable(output)
    _hub_lines_in_the_log()
    repository = look_up(name, revision)
    at = f"{HUB}{name}@{repository.commit}"
    if revision:
        log.info("%s is commit %s", uri, repository.commit)
    else:
        log.warning("%s names no revision: %s is taken, now %s", uri, DEFAULT_REVISION, at)
    chosen = choose(repository, weights, include)
    with atomic_directory(output) as part:
        hashes = _fetch_all(repository, chosen, part)
        source = {"path": f"{HUB}{name}", "revision": revision or DEFAULT_REVISION, "commit": repository.commit}
        return manifest.write(part, "download", source, hashes)


def _hub_lines_in_the_log() -> None:
    """huggingface_hub's lines, as of a cut connection, go where ours go."""
    logger = logging.getLogger("huggingface_hub")
    logger.handlers.clear()
    logger.propagate = True


def choose(repository: Repository, weights: str | None = None, include: Sequence[str] = ()) -> dict[str, str]:
    """What to fetch: from the path below the output to the name in the repository."""
    found = {kind: names for kind in FORMATS if (names := _weights(repository, kind))}
    kind = weights or next(iter(found), None)
    if kind not in found and (weights or not include):
        raise UserError(_no_weights(repository, weights, list(found)))
    along = [name for name in repository.files if goes_along(name)]
    if kind in ("safetensors", "bin") and "config.json" in repository.files:
        along.append("config.json")
    wanted = {name: name for name in [*along, *_included(repository, include)]}
    # Meta's files of a repository that has both stand in original/
    return wanted | {name.removeprefix("original/"): name for name in found.get(kind or "", [])}


def _weights(repository: Repository, kind: str) -> list[str]:
    """The files of one format of weights, empty if there is none."""
    if kind == "meta":
        return _meta_weights(repository)
    return _hf_weights(repository, "model.safetensors" if kind == "safetensors" else "pytorch_model.bin")


def _hf_weights(repository: Repository, single: str) -> list[str]:
    """One file, or an index and the files that it names; an index counts first, as everywhere."""
    index = f"{single}.index.json"
    if index not in repository.files:
        return [single] if single in repository.files else []
    table = read_json(fetch(repository, index), "the repository is damaged, take another revision")
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        raise UserError(f"{HUB}{repository.name}: {index} has no weight_map: take another revision")
    named = sorted({str(name) for name in table["weight_map"].values()})
    missing = [name for name in named if name not in repository.files]
    if missing:
        raise UserError(f"{HUB}{repository.name}: {index} names {', '.join(missing)}, and the repository has none such")
    return [index, *named]


def _meta_weights(repository: Repository) -> list[str]:
    """consolidated.*.pth, params.json and tokenizer.model, at the top or in original/."""
    for folder in ("", "original/"):
        shards = [name for name in repository.files if re.fullmatch(rf"{folder}consolidated\.\d+\.pth", name)]
        beside = [f"{folder}{name}" for name in ("params.json", "tokenizer.model")]
        if shards and beside[0] in repository.files:
            return [*shards, *(name for name in beside if name in repository.files)]
    return []


def _no_weights(repository: Repository, asked: str | None, there: list[str]) -> str:
    names = sorted(repository.files)
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if there:
        return f"{HUB}{repository.name} has no weights of format {asked}, but {', '.join(there)}"
    return (
        f"{HUB}{repository.name} has no weights that llmpipe knows: {listed or 'nothing'} found; expected"
        " model.safetensors, pytorch_model.bin, or Meta's consolidated.*.pth with params.json."
        " --include PATTERN fetches other files"
    )


def _included(repository: Repository, patterns: Sequence[str]) -> list[str]:
    found = []
    for pattern in patterns:
        names = [name for name in repository.files if fnmatchcase(name, pattern)]
        if not names:
            raise UserError(f"--include {pattern}: {HUB}{repository.name} has no such file")
        for name in names:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise UserError(f"{HUB}{repository.name} has a file {name!r}, which would lie outside of the output")
        found += names
    return found


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
