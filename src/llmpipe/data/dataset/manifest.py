"""PREFIX.manifest.json: which tokenizer, rules and source files made a dataset; written last.

    {"llmpipe": "0.1.0", "kind": "dataset", "tokenizer": {"path": …, "sha256": …, "vocab_size": 32000, …},
     "corpus_kind": "text", "bos": true, "append_eod": true, "text_key": "text", "separator": "\\n\\n",
     "documents": 100, "empty_documents": 0, "rejected_rows": 0, "tokens": 12345,
     "sources": [{"path": …, "bytes": …, "sha256": …}], "files": {"corpus.bin": {"sha256": …, "bytes": …}, …}}

A part of a corpus also has "part": {"number": 3, "count": 16, "corpus": its key, "skip_bad": 0}, and in each source the
bytes "start" and "stop" that are its own; the part that a file begins in has the file's hash. Megatron's own datasets
have no manifest.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llmpipe
from llmpipe.errors import UserError
from llmpipe.files import read_json, sha256, write_json
from llmpipe.hashing import FileHashes

REMEDY = "tokenize the corpus again"
ROLES = ".roles"
"""Between PREFIX and .bin or .idx: whose each token is, see `llmpipe.data.dataset.roles`."""


def suffixed(prefix: Path, suffix: str) -> Path:
    """PREFIX with a suffix added; what looks like a suffix in PREFIX itself stays."""
    return prefix.with_name(prefix.name + suffix)


def bin_path(prefix: Path) -> Path:
    return suffixed(prefix, ".bin")


def idx_path(prefix: Path) -> Path:
    return suffixed(prefix, ".idx")


def manifest_path(prefix: Path) -> Path:
    return suffixed(prefix, ".manifest.json")


def rejects_path(prefix: Path) -> Path:
    """Where the bad rows that were left out of a dataset are listed."""
    return suffixed(prefix, ".rejects.jsonl")


def retire(prefix: Path) -> None:
    """Take an older dataset away before parts of a new one take its names."""
    manifest_path(prefix).unlink(missing_ok=True)
    for old in (prefix, suffixed(prefix, ROLES)):
        idx_path(old).unlink(missing_ok=True)
    bin_path(suffixed(prefix, ROLES)).unlink(missing_ok=True)
    rejects_path(prefix).unlink(missing_ok=True)


def hashes(prefix: Path, beside: Iterable[Path] = ()) -> dict[Path, str]:
    """The SHA-256 of the files of a dataset, and of others, which costs little more."""
    with FileHashes([*_files(prefix), *beside]) as files:
        return files.results()


def write(prefix: Path, facts: dict[str, Any], known: dict[Path, str] | None = None) -> None:
    """Write the manifest of a dataset; `facts` is all but version, kind and files, `known` what `hashes` gives."""
    known = known or hashes(prefix)
    files = {path.name: {"sha256": known[path], "bytes": path.stat().st_size} for path in _files(prefix)}
    write_json(manifest_path(prefix), {"llmpipe": llmpipe.__version__, "kind": "dataset", **facts, "files": files})


def read(prefix: Path) -> dict[str, Any] | None:
    """The manifest of a dataset, None if it has none (Megatron's own datasets)."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    return read_json(path, REMEDY)


def template_of(prefix: Path) -> str | None:
    """The name of the chat template that wrote a dataset; None for texts, and without a manifest."""
    return (read(prefix) or {}).get("template")


def written(prefix: Path) -> list[int]:
    """When the files of a dataset were last written, in ns."""
    return [path.stat().st_mtime_ns for path in _files(prefix)]


def digest(prefix: Path) -> str:
    """The identity of a dataset, wherever it lies: one SHA-256 over those of its files, .bin and .idx, and of roles."""
    known = _entries(prefix)
    hashes = [known[path]["sha256"] if path in known else sha256(path) for path in _files(prefix)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def check(prefix: Path) -> None:
    """Read the files of a dataset; UserError for one that is not the file of its manifest, if it has one."""
    for path, entry in _entries(prefix).items():
        if not path.is_file():
            raise UserError(f"{path} is missing, but {manifest_path(prefix)} names it: {REMEDY}")
        found = path.stat().st_size
        if found != entry["bytes"]:
            raise UserError(f"{path} is damaged: {found:,} bytes, its manifest says {entry['bytes']:,}; {REMEDY}")
        if (hashed := sha256(path)) != entry["sha256"]:
            known = entry["sha256"]
            raise UserError(f"{path} is damaged: its SHA-256 is {hashed}, its manifest says {known}; {REMEDY}")


def _entries(prefix: Path) -> dict[Path, dict[str, Any]]:
    """What the manifest says of each file, by what names end with: a dataset may have been renamed since."""
    files = (read(prefix) or {"files": {}})["files"]
    return {suffixed(prefix, _end(name)): entry for name, entry in files.items()}


def _files(prefix: Path) -> list[Path]:
    """The files that a dataset is made of; those of roles where it has them."""
    roles = suffixed(prefix, ROLES)
    more = [bin_path(roles), idx_path(roles)] if idx_path(roles).is_file() else []
    return [bin_path(prefix), idx_path(prefix), *more]


def _end(name: str) -> str:
    return next(end for end in (f"{ROLES}.bin", f"{ROLES}.idx", ".bin", ".idx") if name.endswith(end))
