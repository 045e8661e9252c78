"""Where weights came from, for the manifest: the source's own digest, or the SHA-256 of every file that says weights.

Whatever can show a flipped bit is looked at here, while the bytes are hashed: the source's manifest, the CRC-32 of each
tensor in torch's files, the SHA-256 that names a file of the hub's cache.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import hf_weights, manifest
from llmpipe.checkpoint.containers import distcp
from llmpipe.checkpoint.containers.torch_file import verify_crc
from llmpipe.checkpoint.easylm_files import split_prefix, weights_file
from llmpipe.checkpoint.formats import kind_of
from llmpipe.errors import UserError

_PATTERNS = (
    "params.json", "consolidated.*.pth", "config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin",
    "latest_checkpointed_iteration.txt", "**/model_optim_rng.pt", "**/model_rng.pt", "**/*.distcp", "**/.metadata",
    "**/common.pt", "streaming_*", "*.msgpack", "metadata*.pkl",
)  # fmt: skip
_TORCH = (".pth", ".pt", ".bin")


def origin(path: Path, kind: str, hashes: Mapping[Path, str] | None) -> dict[str, Any]:
    """A source for the manifest; UserError if a file with checksums is damaged.

    `hashes` has the SHA-256 of what `to_hash` names. None for a conversion without: names and sizes alone.
    """
    plain = split_prefix(path)[1]
    if manifest.has(plain):
        made = manifest.read(plain)
        manifest.compare(plain, made, hashes or {})
        return {"path": str(path), "format": kind, "digest": made.digest}
    folder = plain if plain.is_dir() else plain.parent
    if hashes is None:
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in weight_files(plain)}
        return {"path": str(path), "format": kind, "bytes": sizes}
    for file, digest in hashes.items():
        _check_blob(file, digest)
    named = {str(file.relative_to(folder)): digest for file, digest in sorted(hashes.items())}
    return {"path": str(path), "format": kind, "files": named}


def to_hash(path: Path) -> list[Path]:
    """The files of a source whose SHA-256 are its identity: those of its manifest, or all that say weights."""
    plain = split_prefix(path)[1]
    if manifest.has(plain):
        return manifest.to_hash(plain, manifest.read(plain))
    return weight_files(plain)


def check_all_sums(path: Path) -> None:
    """UserError if a foreign source's file differs from the checksums in it."""
    plain = split_prefix(path)[1]
    if not manifest.has(plain):
        for file in weight_files(plain):
            check_sums(file)


def weight_files(path: Path) -> list[Path]:
    """The files of a foreign source, a directory or a file, that say what its weights are."""
    if path.is_file():
        return [path]
    if kind_of(path) == "hf":  # other weights may lie beside
        chosen = hf_weights.weight_files(path)
        return sorted(path / name for name in {"config.json", *chosen.files, *([chosen.index] if chosen.index else [])})
    found = {file for pattern in _PATTERNS for file in path.glob(pattern) if file.is_file()}
    flax = weights_file(path)  # of any name
    return sorted(found | ({flax} if flax else set()))


def _check_blob(file: Path, digest: str) -> None:
    """UserError if a link into the hub's cache, which names large files by their SHA-256, leads to other bytes."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise UserError(f"{file} is damaged ({blob} has another SHA-256): remove that file and download it again")


def check_sums(file: Path) -> None:
    """UserError if a file of torch's differs from the checksums in it."""
    if file.suffix in _TORCH:
        verify_crc(file)
    elif file.name == distcp.METADATA:
        found = distcp.read_distcp(file.parent)
        weights = [tensor for name, tensor in found.tensors.items() if not name.startswith("optimizer.")]
        for item in (chunk.item for tensor in weights for chunk in tensor.chunks):
            verify_crc(item.file, start=item.start, size=item.size)
