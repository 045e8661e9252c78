"""PREFIX.idx as Megatron and its forks have written it over the years; `dataset.indexed` says what we write.

- The mmap format starts with `MMIDIDX`. Type codes 6 and 7 are floating-point numbers: 6 is float64; 7 is float64 in
  Megatron-LLM and alibaba's Megatron-LLaMA, float32 in Megatron-LM. The size of the .bin tells which.
- Megatron-LLM's instruction files (PREFIX-text, PREFIX-role) end no document: their document index is 0 alone. Each
  sequence is a document then.
- The older format, `lazy` or `cached`, starts with 8 bytes `TNTIDX\\0\\0`. Then uint64: version (1), type code, bytes
  of a unit, number of sequences, number of sizes, length of the document index. Then int64: per sequence and once more,
  where its sizes start (it has one: a sequence is no table) and where its tokens start, in units; the sizes, in tokens;
  the document index. A unit is not always a token: that of float64 has 4 bytes there.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}

_OLD_MAGIC = b"TNTIDX\0\0"
_OLD_HEADER = struct.Struct("<8sQQQQQQ")
_UNITS = (1, 2, 4, 8)
_READ = {code: (np.dtype(dtype),) for code, dtype in DTYPES.items()}
_READ |= {6: (np.dtype(np.float64),), 7: (np.dtype(np.float64), np.dtype(np.float32))}


@dataclass(frozen=True, slots=True)
class Index:
    """What an .idx says, not yet compared with itself or with its .bin."""

    dtype: np.dtype[Any]
    """Of the tokens."""
    sizes: NDArray[np.int32]
    """Tokens of each sequence."""
    pointers: NDArray[np.int64]
    """The byte of the .bin at which each sequence starts."""
    documents: NDArray[np.int64]
    """The sequence at which each document starts, and the number of sequences."""


def read_index(path: Path, bin_bytes: int) -> Index:
    """An .idx of any of the formats; UserError for what is none, truncated or too long."""
    with path.open("rb") as file:
        head = file.read(_OLD_HEADER.size)
    index = _read_old(path, head, bin_bytes) if head[:8] == _OLD_MAGIC else _read_mmap(path, head, bin_bytes)
    if len(index.sizes) and index.documents.tolist() == [0]:
        return Index(index.dtype, index.sizes, index.pointers, np.arange(len(index.sizes) + 1))
    return index


def _read_mmap(path: Path, head: bytes, bin_bytes: int) -> Index:
    if not head.startswith(MAGIC[: len(head)]):
        raise UserError(f"{path} is not an index of Megatron's mmap format: it starts with {head[:9]!r}, not {MAGIC!r}")
    _check_header(path, head, HEADER)
    _, version, code, sequences, documents = HEADER.unpack_from(head)
    _check_version(path, version)
    _check_size(path, HEADER.size + 12 * sequences + 8 * documents, sequences)
    with path.open("rb") as file:
        file.seek(HEADER.size)
        sizes = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        return Index(_dtype(path, code, sizes, bin_bytes), sizes, pointers, np.fromfile(file, "<i8", documents))


def _read_old(path: Path, head: bytes, bin_bytes: int) -> Index:
    _check_header(path, head, _OLD_HEADER)
    _, version, code, unit, sequences, num_sizes, documents = _OLD_HEADER.unpack_from(head)
    _check_version(path, version)
    _check_size(path, _OLD_HEADER.size + 8 * (2 * (sequences + 1) + num_sizes + documents), sequences)
    with path.open("rb") as file:
        file.seek(_OLD_HEADER.size)
        places, starts = np.fromfile(file, "<i8", 2 * (sequences + 1)).reshape(2, -1)
        sizes = np.fromfile(file, "<i8", num_sizes)
        document_index = np.fromfile(file, "<i8", documents)
    if num_sizes != sequences or not np.array_equal(places, np.arange(sequences + 1)):
        raise UserError(f"{path} is damaged, or no index of tokens: not every sequence has one size")
    if unit not in _UNITS or not 0 <= int(starts.min()) <= int(starts.max()) * unit == bin_bytes:
        raise UserError(
            f"{path} does not fit its .bin of {bin_bytes} bytes: its sequences lie from {starts.min()} to"
            f" {starts.max()} in units of {unit} bytes; tokenize the corpus again"
        )
    if num_sizes and (sizes.min() < 0 or sizes.max() > np.iinfo(np.int32).max):
        raise UserError(f"{path} is damaged: it has sequences of {sizes.min()} to {sizes.max()} tokens")
    sizes = sizes.astype(np.int32)
    return Index(_dtype(path, code, sizes, bin_bytes), sizes, starts[:-1] * unit, document_index)


def _check_header(path: Path, head: bytes, header: struct.Struct) -> None:
    if len(head) < header.size:
        raise UserError(f"{path} is truncated: {len(head)} bytes, but the header alone needs {header.size}")


def _check_version(path: Path, version: int) -> None:
    if version != VERSION:
        raise UserError(f"{path} has version {version}; llmpipe reads version {VERSION}")


def _check_size(path: Path, expected: int, sequences: int) -> None:
    found = path.stat().st_size
    if found != expected:
        what = "is truncated" if found < expected else "has bytes too many (a multimodal dataset of Megatron?)"
        raise UserError(f"{path} {what}: {found} bytes, but {sequences} sequences need {expected}; tokenize again")


def _dtype(path: Path, code: int, sizes: NDArray[np.int32], bin_bytes: int) -> np.dtype[Any]:
    """The type of a code; of several that it has stood for, the one that the .bin's size asks for."""
    if code not in _READ:
        raise UserError(f"{path} has type code {code}, which is no type of tokens; known: {sorted(_READ)}")
    num_tokens = int(sizes.sum(dtype=np.int64))
    return next((one for one in _READ[code] if num_tokens * one.itemsize == bin_bytes), _READ[code][0])
