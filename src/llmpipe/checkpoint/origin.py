"""Where weights came from, for the manifest: the source's own digest, or the SHA-256 of every file that says weights.

Whatever can show a flipped bit is looked at here, while the bytes are hashed: the source's manifest, the CRC-32 of each
tensor in torch's files, the SHA-256 that names a file of the hub's cache.
"""

import re
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.containers import distcp
from llmpipe.checkpoint.containers.torch_file import verify_crc
from llmpipe.checkpoint.easylm_files import split_prefix, weights_file
from llmpipe.errors import UserError
from llmpipe.files import sha256

_PATTERNS = (
    "params.json", "consolidated.*.pth", "config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin",
    "latest_checkpointed_iteration.txt", "**/model_optim_rng.pt", "**/model_rng.pt", "**/*.distcp", "**/.metadata",
    "**/common.pt", "streaming_*", "*.msgpack", "metadata*.pkl",
)  # fmt: skip
_TORCH = (".pth", ".pt", ".bin")


def origin(path: Path, kind: str, hashed: bool = True) -> dict[str, Any]:
    """A source for the manifest; UserError if a file with checksums is damaged. Not hashed: names and sizes alone."""
    plain = split_prefix(path)[1]
    if (plain / manifest.NAME).is_file():
        made = manifest.check(plain) if hashed else manifest.read(plain)
        return {"path": str(path), "format": kind, "digest": made.digest}
    folder = plain if plain.is_dir() else plain.parent
    files = {str(file.relative_to(folder)): file for file in (weight_files(plain) if plain.is_dir() else [plain])}
    if not hashed:
        return {"path": str(path), "format": kind, "bytes": {name: file.stat().st_size for name, file in files.items()}}
    hashes = {name: sha256(file) for name, file in files.items()}
    for name, file in files.items():
        _check_blob(file, hashes[name])
        check_sums(file)
    return {"path": str(path), "format": kind, "files": hashes}


def weight_files(path: Path) -> list[Path]:
    """The files of a foreign source that say what its weights are."""
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
