"""safetensors files written one tensor at a time, read only after their length is proven.

The format, little endian:

- 8 bytes: N, the length of the header
- N bytes: JSON, {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {"k": "v"}},
  padded with spaces so that the tensors start at a multiple of 8
- the tensors' bytes, row-major, in the order of their offsets, without gaps

The header is known from names, types and shapes alone, so it is written first and no more than one tensor is in memory.
Many files make one model with model.safetensors.index.json:
{"metadata": {"total_size": bytes}, "weight_map": {name: file}}.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES, sha256, write_json
from llmpipe.progress import Progress

GET_AGAIN = "copy or download it again"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file before its bytes are there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(entries: Iterable[Entry], metadata: dict[str, str]) -> bytes:
    """The length and the JSON that a file of these tensors starts with."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.bytes
        table[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path,
    entries: list[Entry],
    read: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
    shown: Progress | None = None,
) -> str:
    """Write the tensors that `read` gives by name, each cast to its entry's type; returns the file's SHA-256.

    The file is not atomic by itself: it is made inside a `files.atomic_directory`.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = header_bytes(entries, metadata)
        digest.update(header)
        file.write(header)
        for entry in entries:
            tensor = read(entry.name).to(entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} is not {entry.shape}"
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK_BYTES):  # hash while the bytes are in the cache
                digest.update(data[start : start + CHUNK_BYTES])
                file.write(data[start : start + CHUNK_BYTES])
            del tensor, data
            if shown:
                shown.add(entry.bytes, entry.name)
    return digest.hexdigest()


def write_model(
    directory: Path,
    entries: list[Entry],
    read: Callable[[str], torch.Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
    shown: Progress | None = None,
) -> dict[str, str]:
    """Write one model.safetensors, or numbered files up to `max_file_bytes` with an index; returns SHA-256 by file."""
    parts = _split(entries, max_file_bytes)
    if len(parts) == 1:
        return {
            "model.safetensors": write_file(directory / "model.safetensors", entries, read, {"format": "pt"}, shown)
        }
    hashes, weight_map = {}, {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        hashes[name] = write_file(directory / name, part, read, {"format": "pt"}, shown)
        weight_map |= {entry.name: name for entry in part}
    total = sum(entry.bytes for entry in entries)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes | {INDEX: sha256(directory / INDEX)}


def _split(entries: list[Entry], max_file_bytes: int) -> list[list[Entry]]:
    """The entries in order, cut where a file would grow beyond the limit; a larger tensor has a file of its own."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.bytes > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.bytes
    return parts


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a file; UserError if it is not safetensors or not all there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{path} is truncated or not safetensors: its header says that it is {length} bytes long, but the file"
                f" has {size} bytes: copy or download it again"
            )
        try:
            table = dict(json.loads(file.read(length)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} is not safetensors, its header is not JSON ({error}): copy or download it again"
            ) from error
    metadata = table.pop("__metadata__", {})
    expected = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    if size != expected:
        raise UserError(f"{path} is truncated: {size} bytes found, {expected} expected: copy or download it again")
    return {name: _entry(path, name, value) for name, value in table.items()}, metadata


def _entry(path: Path, name: str, value: dict[str, Any]) -> Entry:
    if value["dtype"] not in DTYPES:
        raise UserError(f"{path}: the tensor {name} is of type {value['dtype']}; llmpipe reads {', '.join(DTYPES)}")
    return Entry(name, DTYPES[value["dtype"]], tuple(value["shape"]))
