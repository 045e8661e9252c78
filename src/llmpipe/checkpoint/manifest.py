"""manifest.json: the SHA-256 of every file of a directory, where it came from, the llmpipe version; written last.

    {"llmpipe": "0.1.0", "kind": "checkpoint", "source": {...}, "files": {"config.json": {"sha256": "…", "bytes": 123}}}

A directory without one is not finished. Hidden files (Snakemake's time stamp) are not part of a directory, but for the
table of contents of torch.distributed.checkpoint.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmpipe
from llmpipe.errors import UserError
from llmpipe.files import sha256, write_json
from llmpipe.hashing import FileHashes

NAME = "manifest.json"
_COUNTED = ".metadata"
_SNAKEMAKE = ".snakemake_timestamp"  # in a directory that a rule made or is about to make


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished directory holds."""

    kind: str
    """checkpoint, rank_files, weights, export, training_checkpoint, download."""
    source: dict[str, Any]
    """Where it came from: paths, and the digests of what it was made of."""
    files: dict[str, dict[str, Any]]
    version: str = llmpipe.__version__

    @property
    def digest(self) -> str:
        """The directory's identity, wherever it lies: the SHA-256 over its files' names and hashes."""
        table = json.dumps({name: entry["sha256"] or entry["made"] for name, entry in sorted(self.files.items())})
        return hashlib.sha256(table.encode()).hexdigest()


def write(directory: Path, kind: str, source: dict[str, Any], known: dict[str, str | None] | None = None) -> Manifest:
    """Hash every file of the directory and write its manifest; `known` has hashes that a writer already took.

    A file that is known as None stays without a hash (--no-hash): a random mark tells it from every other.
    """
    files = {name: _entry(directory / name, name, known or {}) for name in _names(directory)}
    manifest = Manifest(kind, source, files)
    write_json(directory / NAME, {"llmpipe": manifest.version, "kind": kind, "source": source, "files": files})
    return manifest


def has(directory: Path) -> bool:
    """Whether llmpipe's manifest lies there, a damaged one too; other tools write other things under that name."""
    try:
        values = json.loads((directory / NAME).read_bytes())
    except PermissionError:
        return True
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return not isinstance(values, dict) or "llmpipe" in values


def read(directory: Path) -> Manifest:
    """The manifest of a finished directory; UserError if there is none."""
    path = directory / NAME
    if not has(directory):
        raise UserError(
            f"{directory} has no {NAME}: it is not a finished output of llmpipe; run the stage that makes it again"
        )
    try:
        values = json.loads(path.read_text())
        found = Manifest(values["kind"], dict(values["source"]), dict(values["files"]), values["llmpipe"])
        _ = found.digest, sum(entry["bytes"] for entry in found.files.values())  # whatever is read later
        _ = "".join(entry["sha256"] or "" for entry in found.files.values())
        _check_values(found)
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): run the stage that makes it again") from error


def _check_values(found: Manifest) -> None:
    """ValueError for what `write` never writes, and what reads the manifest could not take."""
    if not found.files:
        raise ValueError("it lists no files")
    expected = {"adapter": dict, "told": dict, "added_tokens": list}
    if wrong := [key for key, kind in expected.items() if not isinstance(found.source.get(key, kind()), kind)]:
        raise ValueError(f"its source's {wrong[0]} is {found.source[wrong[0]]!r}")
    if "adapter" in found.source:
        adapter = found.source["adapter"]
        files = [*adapter["files"], *adapter["files"].values()]  # names and SHA-256
        if wrong := [value for value in (adapter["path"], *files) if not isinstance(value, str)]:
            raise ValueError(f"its source's adapter says {wrong[0]!r}, expected text")
    if found.source.get("added_tokens") and found.source["new_rows"] not in ("mean", "zeros"):
        raise ValueError(f"its source's new_rows is {found.source['new_rows']!r}")


def check(directory: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Read the manifest and compare every file with it; UserError naming the first file that differs.

    With `parts`, only each parts-th file from number `part` on is compared: the rest is other processes'.
    """
    manifest = read(directory)
    with FileHashes(to_hash(directory, manifest)[part::parts]) as hashes:
        compare(directory, manifest, hashes.results())
    return manifest


def to_hash(directory: Path, manifest: Manifest) -> list[Path]:
    """The files with a SHA-256 in the manifest; UserError if one is missing, of another size, or weights not listed."""
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing, but {NAME} lists it: run the stage that makes {directory} again")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, but {NAME} says {entry['bytes']}:"
                " it is truncated or was changed"
            )
    if unlisted := sorted({path.name for path in directory.glob("[!.]*.safetensors")} - manifest.files.keys()):
        raise UserError(
            f"{directory / unlisted[0]} is not in {NAME}, and nothing says that it is whole: run the stage that makes"
            f" {directory} again, or remove that file"
        )
    return [directory / name for name, entry in manifest.files.items() if entry["sha256"]]


def compare(directory: Path, manifest: Manifest, hashes: Mapping[Path, str]) -> None:
    """UserError naming the first file whose SHA-256 is not the manifest's."""
    for path, found in sorted(hashes.items()):
        if found != manifest.files[str(path.relative_to(directory))]["sha256"]:
            raise UserError(
                f"{path} does not have the SHA-256 that {NAME} says: it was changed after it was made: make it"
                f" again, or remove {NAME} where the change is meant"
            )


def check_replaceable(directory: Path) -> None:
    """UserError if the directory holds something, hidden files counting, and no manifest of llmpipe's: it is kept."""
    if not directory.exists() or _is_ours(directory / NAME):
        return
    if not directory.is_dir():
        raise UserError(f"--output {directory} is a file, which a directory does not replace: name another place")
    found = sorted(entry.name for entry in directory.iterdir() if entry.name != _SNAKEMAKE)
    if found:
        raise UserError(
            f"--output {directory} holds {', '.join(found[:4])} and no {NAME} of llmpipe's: llmpipe did not make it"
            " and does not replace it: name another directory or remove it"
        )


def _is_ours(path: Path) -> bool:
    """Whether a manifest is llmpipe's, whatever its state: other tools write files of that name too."""
    try:
        return path.is_file() and '"llmpipe"' in path.read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _entry(path: Path, name: str, known: dict[str, str | None]) -> dict[str, Any]:
    size = path.stat().st_size
    if name in known and known[name] is None:
        return {"sha256": None, "made": secrets.token_hex(16), "bytes": size}
    return {"sha256": known.get(name) or sha256(path), "bytes": size}


def _names(directory: Path) -> list[str]:
    """The files that count, sorted, relative to the directory."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    shown = (p for p in found if p.name == _COUNTED or not any(part.startswith(".") for part in p.parts))
    return sorted(str(path) for path in shown if str(path) != NAME)
