"""PREFIX.manifest.json: which tokenizer, rules and source files made a dataset; written last.

    {"llmpipe": "0.1.0", "kind": "dataset", "tokenizer": {"path": …, "sha256": …, "vocab_size": 32000, …},
     "bos": true, "append_eod": true, "text_key": "text", "documents": 100, "empty_documents": 0, "tokens": 12345,
     "sources": [{"path": …, "bytes": …, "sha256": …}], "files": {"corpus.bin": {"sha256": …, "bytes": …}, …}}

Megatron's own datasets have none.
"""

import hashlib
from pathlib import Path
from typing import Any

import llmpipe
from llmpipe.files import read_json, sha256, write_json


def suffixed(prefix: Path, suffix: str) -> Path:
    """PREFIX with a suffix added; what looks like a suffix in PREFIX itself stays."""
    return prefix.with_name(prefix.name + suffix)


def bin_path(prefix: Path) -> Path:
    return suffixed(prefix, ".bin")


def idx_path(prefix: Path) -> Path:
    return suffixed(prefix, ".idx")


def manifest_path(prefix: Path) -> Path:
    return suffixed(prefix, ".manifest.json")


def write(prefix: Path, facts: dict[str, Any]) -> None:
    """Hash the two files of a dataset and write its manifest; `facts` is all but version, kind and files."""
    paths = bin_path(prefix), idx_path(prefix)
    files = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths}
    write_json(manifest_path(prefix), {"llmpipe": llmpipe.__version__, "kind": "dataset", **facts, "files": files})


def read(prefix: Path) -> dict[str, Any] | None:
    """The manifest of a dataset, None if it has none (Megatron's own datasets)."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    return read_json(path, "tokenize the corpus again")


def digest(prefix: Path) -> str:
    """The identity of a dataset, wherever it lies: one SHA-256 over those of its .bin and .idx."""
    manifest, paths = read(prefix), (bin_path(prefix), idx_path(prefix))
    # by suffix, because a dataset may have been renamed since
    known = {Path(name).suffix: entry["sha256"] for name, entry in manifest["files"].items()} if manifest else {}
    hashes = [known.get(path.suffix) or sha256(path) for path in paths]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
