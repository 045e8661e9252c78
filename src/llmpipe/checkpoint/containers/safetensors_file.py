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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES, sha256, write_json
from llmpipe.progress import Progress

GET_AGAIN = "copy or download it again"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 100 * 10**6  # as the safetensors library
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


def split(sizes: dict[str, int], max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, list[str]]:
    """The files of a model and the tensors of each, in order: one model.safetensors, or numbered ones up to the limit.

    A tensor larger than the limit has a file of its own. `sizes` are bytes.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for name, count in sizes.items():
        if parts[-1] and size + count > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += count
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def write_index(directory: Path, files: dict[str, list[str]], total_bytes: int) -> dict[str, str]:
    """Write model.safetensors.index.json if there are several files; returns its SHA-256 by name."""
    if len(files) == 1:
        return {}
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return {INDEX: sha256(directory / INDEX)}


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a file; UserError unless they fill it from the header to its end, each once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{path} is truncated or not safetensors: its header says that it is {length} bytes long, but the file"
                f" has {size} bytes: {GET_AGAIN}"
            )
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}: {GET_AGAIN}")
        table = _table(path, file.read(length))
    metadata = table.pop("__metadata__", {})
    found = {name: _stored(path, 8 + length, name, value) for name, value in table.items()}
    _check_places(path, found, 8 + length, size)
    return found, metadata


def _table(path: Path, header: bytes) -> dict[str, Any]:
    try:
        pairs: list[tuple[str, Any]] = json.loads(header, object_pairs_hook=list)
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise UserError(f"{path} lists the tensor {twice[0]} twice: {GET_AGAIN}")
        return {name: dict(value) for name, value in pairs}
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not safetensors, its header is not JSON ({error}): {GET_AGAIN}") from error


def _stored(path: Path, data: int, name: str, value: dict[str, Any]) -> StoredTensor:
    dtype = DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise UserError(f"{path}: the tensor {name} is of type {value.get('dtype')}; llmpipe reads {', '.join(DTYPES)}")
    try:
        shape, (begin, end) = tuple(map(int, value["shape"])), value["data_offsets"]
        fits = 0 <= begin <= end and end - begin == math.prod(shape) * dtype.itemsize and min(shape, default=0) >= 0
    except (KeyError, ValueError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: the header's shape and offsets of {name} do not fit each other: {GET_AGAIN}")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return StoredTensor(path, data + begin, dtype, shape, strides)


def _check_places(path: Path, found: dict[str, StoredTensor], data: int, size: int) -> None:
    """The format allows no gaps and no overlaps, and nothing behind the last tensor."""
    at = data
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if tensor.offset != at:
            raise UserError(f"{path}: {name} is at byte {tensor.offset}, but {at} is expected: {GET_AGAIN}")
        at += math.prod(tensor.shape) * tensor.dtype.itemsize
    if size != at:
        raise UserError(f"{path} is truncated: {size} bytes found, {at} expected: {GET_AGAIN}")
