"""Flax's msgpack files: where each array's bytes lie. No array is read, whatever its size, and nothing is run.

Two kinds hold the same values (https://github.com/msgpack/msgpack/blob/master/spec.md; flax.serialization):

- nested: one map of maps, its leaves arrays
- streaming (EasyLM's): records one after the other, each (keys from the outermost in, bytes of the leaf's own msgpack)

An array is extension 1 (a scalar: 3) around (shape, dtype's name, bytes in row-major order). One of more than 1 GiB is
cut in flat pieces: {"__msgpack_chunked_array__": true, "shape": {"0": …}, "chunks": {"0": array, …}}.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from llmpipe.errors import UserError

CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "bfloat16",
    )
}  # fmt: skip
# Of one file: values and nesting that no model comes near, and the longest text (a key).
_NODES, _DEPTH, _TEXT_BYTES = 1_000_000, 50, 4096
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# First byte: kind, and how its length (of bytes, values or pairs) is written.
_SIZED = {
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"), 0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"), 0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"), 0xDC: ("array", ">H"),
    0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array in a file, row-major, in one piece or several."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    """(offset in bytes from the file's beginning, elements) of each, in the array's flat order."""


@dataclass(frozen=True, slots=True)
class MsgpackFile:
    """What a file holds."""

    path: Path
    streaming: bool
    arrays: dict[str, StoredArray]
    """By their keys from the outermost in, joined with "/"."""


def looks_like_msgpack(path: Path) -> bool:
    """Whether a file begins as one of the two kinds does."""
    with path.open("rb") as file:
        head = file.read(4)
    record = len(head) == 4 and head[0] == 0x92 and 0x91 <= head[1] <= 0x9F and 0xA1 <= head[2] <= 0xBF
    return record or (len(head) == 4 and 0x81 <= head[0] <= 0x8F and 0xA1 <= head[1] <= 0xBF and head[2:].isalnum())


def read_msgpack(path: Path) -> MsgpackFile:
    """The arrays of a file of either kind; UserError if it is truncated, damaged or of another kind."""
    arrays: dict[str, StoredArray] = {}
    with path.open("rb") as file:
        reader = _Reader(file, path)
        try:
            streaming = reader.is_stream()
            for keys, value in reader.records() if streaming else [((), reader.value(reader.size))]:
                for name, array in _flat(keys, value):
                    if name in arrays:
                        raise _Damaged(f"it holds {name} twice")
                    arrays[name] = array
            if reader.at != reader.size:
                raise _Damaged(f"{reader.size - reader.at} bytes follow its end")
        except _Damaged as damaged:
            raise UserError(
                f"{path} is truncated, damaged or no msgpack file of flax's or EasyLM's ({damaged}, at byte"
                f" {reader.at} of {reader.size}): copy or download it again"
            ) from damaged
    return MsgpackFile(path, streaming, arrays)


class _Damaged(ValueError):
    """What the format does not allow."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes that are left where they are."""

    offset: int
    size: int


class _Reader:
    """A walk over a file's values that steps over the arrays' bytes."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.at, self.nodes = 0, 0
        self.size = file.seek(0, 2)
        file.seek(0)

    def is_stream(self) -> bool:
        """Records are arrays of two; the other kind is a map."""
        first = self.file.read(1)
        self.file.seek(0)
        return first == b"\x92"

    def records(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Keys and value of each record of a stream."""
        while self.at < self.size:
            record = self.value(self.size)
            if not isinstance(record, list) or len(record) != 2 or not isinstance(record[1], _Span):
                raise _Damaged("a record that is not (keys, bytes)")
            keys, span = record
            if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
                raise _Damaged("a record whose keys are not text")
            yield tuple(keys), self.inside(span)

    def inside(self, span: _Span) -> Any:
        """The one value that the span's bytes are; the walk goes on behind them."""
        self.seek(span.offset)
        value = self.value(span.offset + span.size)
        if self.at != span.offset + span.size:
            raise _Damaged("a value that is shorter than its bytes")
        return value

    def value(self, end: int, depth: int = 0) -> Any:
        """The next value: Python's own, a StoredArray, or a _Span for plain bytes."""
        self.nodes += 1
        if self.nodes > _NODES or depth > _DEPTH:
            raise _Damaged("more values, or deeper ones, than any model has")
        code = self.take(1, end)[0]
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code], end)
        kind, size = self.kind(code, end)
        if kind == "array":
            return [self.value(end, depth + 1) for _ in range(size)]
        if kind == "map":
            return self.map(size, end, depth)
        if kind == "str":
            return self.text(size, end)
        return self.skip(size, end) if kind == "bin" else self.extension(size, end, depth)

    def kind(self, code: int, end: int) -> tuple[str, int]:
        """A sized value's kind and length."""
        for first, last, kind in ((0x80, 0x8F, "map"), (0x90, 0x9F, "array"), (0xA0, 0xBF, "str")):
            if first <= code <= last:
                return kind, code - first
        if 0xD4 <= code <= 0xD8:
            return "ext", 1 << (code - 0xD4)
        if code not in _SIZED:
            raise _Damaged(f"the byte {code:#x}, which begins no value")
        kind, layout = _SIZED[code]
        return kind, self.number(layout, end)

    def map(self, size: int, end: int, depth: int) -> dict[str, Any] | StoredArray:
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(end, depth + 1)
            if not isinstance(key, str) or key in found:
                raise _Damaged("a map whose keys are not text, or not different")
            found[key] = self.value(end, depth + 1)
        return _joined(found, self.path) if CHUNKED in found else found

    def extension(self, size: int, end: int, depth: int) -> Any:
        """Flax's: an array, a complex number (left out) or a scalar."""
        code = self.number(">b", end)
        stop = self.at + size
        if stop > end:
            raise _Damaged("it ends within an array")
        if code == 2:
            return self.skip(size, end) and None
        if code not in (1, 3):
            raise _Damaged(f"the extension {code}, expected flax's 1 to 3")
        found = self.value(stop, depth + 1)
        if self.at != stop or not isinstance(found, list) or len(found) != 3:
            raise _Damaged("an array that is not (shape, dtype, bytes)")
        return self.array(*found)

    def array(self, shape: Any, dtype: Any, span: Any) -> StoredArray:
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise _Damaged("an array without a shape")
        if dtype not in _DTYPES or not isinstance(span, _Span):
            raise _Damaged(f"an array of dtype {dtype!r}, expected {', '.join(_DTYPES)}")
        count, item = math.prod(shape), _DTYPES[dtype].itemsize
        if span.size != count * item:
            raise _Damaged(f"an array of shape {shape} in {dtype} with {span.size} bytes, expected {count * item}")
        return StoredArray(self.path, _DTYPES[dtype], tuple(shape), ((span.offset, count),))

    def text(self, size: int, end: int) -> str:
        if size > _TEXT_BYTES:
            raise _Damaged(f"a text of {size} bytes")
        try:
            return self.take(size, end).decode()
        except UnicodeDecodeError as error:
            raise _Damaged("a text that is not UTF-8") from error

    def number(self, layout: str, end: int) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), end))[0]

    def take(self, size: int, end: int) -> bytes:
        found = self.file.read(size) if self.at + size <= end else b""
        if len(found) != size:
            raise _Damaged("it ends within a value")
        self.at += size
        return found

    def skip(self, size: int, end: int) -> _Span:
        if self.at + size > end:
            raise _Damaged("it ends within an array's bytes")
        span = _Span(self.at, size)
        self.seek(self.at + size)
        return span

    def seek(self, offset: int) -> None:
        self.file.seek(offset)
        self.at = offset


def _joined(table: dict[str, Any], path: Path) -> StoredArray:
    """One array of flax's chunks, which are flat."""
    shape, chunks = _in_order(table.get("shape")), _in_order(table.get("chunks"))
    if not all(type(size) is int and size >= 0 for size in shape) or not chunks:
        raise _Damaged("a chunked array without a shape or chunks")
    if not all(isinstance(chunk, StoredArray) and chunk.dtype == chunks[0].dtype for chunk in chunks):
        raise _Damaged("a chunked array whose chunks are not arrays of one type")
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    if sum(count for _, count in pieces) != math.prod(shape):
        raise _Damaged(f"a chunked array of shape {shape} whose chunks do not fill it")
    return StoredArray(path, chunks[0].dtype, tuple(shape), pieces)


def _in_order(table: Any) -> list[Any]:
    """{"0": a, "1": b} as [a, b]."""
    if not isinstance(table, dict) or set(table) != {str(number) for number in range(len(table))}:
        raise _Damaged("a chunked array whose parts are not numbered from 0")
    return [table[str(number)] for number in range(len(table))]


def _flat(keys: tuple[str, ...], value: Any) -> Iterator[tuple[str, StoredArray]]:
    """The arrays of nested maps and lists by name; other leaves (a step's number) are left out."""
    if isinstance(value, StoredArray):
        yield "/".join(keys), value
    elif isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from _flat((*keys, str(key)), child)
