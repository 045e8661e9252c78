"""Files of torch.save whose tensors are holes, to be filled in place: no tensor is ever in memory.

The records are those that torch's own writer makes, in a folder of the file's name without its suffix: `data.pkl` in
protocol 2, `byteorder`, one `data/KEY` for each storage at a multiple of 64 bytes, `version`.
"""

import math
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch._utils import _rebuild_tensor_v2  # the name that stands in every file of torch.save

from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import STORAGES, read_torch_file, tensors
from llmpipe.checkpoint.containers.zip_records import crc_of, directory_entries, read_records
from llmpipe.errors import UserError

_ALIGNMENT = 64
_NEW_YEAR_1980 = 33  # the zip's first day: the same tree makes the same bytes
_MAX32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_CLASSES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def write_skeleton(path: Path, tree: Any) -> dict[str, StoredTensor]:
    """Write a tree, its meta tensors as holes; where each tensor's bytes lie, by its dotted path (see `tensors`).

    The tree is of dicts, lists, tuples, Namespaces and plain values; what is not a meta tensor is written with its
    bytes. A tensor that is in it twice is stored once. Nothing else may be at `path` or read it before `seal`.
    """
    entries = _entries(tree, path.stem)
    with path.open("wb") as file:
        for entry in entries:
            entry.write(file)
        _write_directory(file, entries)
    return tensors(read_torch_file(path))


def seal(path: Path, crcs: Mapping[int, int] | None = None) -> None:
    """Write the checksum of each record, after the holes were filled, into both of its headers.

    `crcs` has the CRC-32 of tensors that are known, by StoredTensor.offset; the others' bytes are read.
    """
    with path.open("r+b") as file:
        records = read_records(file, path)
        entries = directory_entries(file, path)
        for record in records.values():
            known = (crcs or {}).get(record.offset)
            crc = struct.pack("<I", crc_of(file, record) if known is None else known)
            for place in (record.header + 14, entries[record.name] + 16):
                file.seek(place)
                file.write(crc)


@dataclass(slots=True)
class _Entry:
    """One record; `data` is None for a hole."""

    name: str
    size: int
    data: bytes | None
    header: int = 0

    def write(self, file: IO[bytes]) -> None:
        """The local header, padded so that the bytes are aligned, and the bytes."""
        self.header = file.tell()
        extra = _zip64(self.size, self.size) if self.size >= _MAX32 else b""
        start = self.header + _LOCAL.size + len(self.name) + len(extra) + 4
        padding = -start % _ALIGNMENT
        extra += b"FB" + struct.pack("<H", padding) + bytes(padding)  # as torch pads
        size = min(self.size, _MAX32)
        file.write(_LOCAL.pack(b"PK\3\4", *self.kind(), self.crc(), size, size, len(self.name), len(extra)))
        file.write(self.name.encode() + extra)
        if self.data is None:
            file.seek(self.size, os.SEEK_CUR)
        else:
            file.write(self.data)

    def central(self) -> bytes:
        """The entry of the table of contents."""
        large = [value for value in (self.size, self.size, self.header) if value >= _MAX32]
        extra = _zip64(*large) if large else b""
        size, header = min(self.size, _MAX32), min(self.header, _MAX32)
        numbers = (self.crc(), size, size, len(self.name), len(extra), 0, 0, 0, 0, header)
        return _CENTRAL.pack(b"PK\1\2", 45, *self.kind(), *numbers) + self.name.encode() + extra

    def kind(self) -> tuple[int, ...]:
        """The version needed (4.5: zip64), flags, method (stored), time, date."""
        return 45, 0, 0, 0, _NEW_YEAR_1980

    def crc(self) -> int:
        return zlib.crc32(self.data or b"")


def _zip64(*values: int) -> bytes:
    """The extra field of sizes beyond 32 bits."""
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)


def _write_directory(file: IO[bytes], entries: list[_Entry]) -> None:
    """The table of contents, and its place and size in 64 and in 32 bits."""
    start = file.tell()
    table = b"".join(entry.central() for entry in entries)
    count, end = len(entries), start + len(table)
    file.write(table)
    file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(table), start))
    file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
    short = min(count, 0xFFFF)
    file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, len(table), min(start, _MAX32), 0))


def _entries(tree: Any, base: str) -> list[_Entry]:
    """The records of a tree, in torch's order, in a folder of the archive."""
    data = BytesIO()
    pickler = _Pickler(data, protocol=2)
    pickler.dump(tree)
    storages = [
        _Entry(f"{base}/data/{key}", math.prod(tensor.shape) * tensor.dtype.itemsize, _bytes(tensor))
        for key, tensor in enumerate(pickler.tensors)
    ]
    small = {"data.pkl": data.getvalue(), "byteorder": b"little", "version": b"3\n"}
    first, order, version = (_Entry(f"{base}/{name}", len(value), value) for name, value in small.items())
    return [first, order, *storages, version]


def _bytes(tensor: torch.Tensor) -> bytes | None:
    """The elements in order; None for a meta tensor, which has none."""
    if tensor.is_meta:
        return None
    return bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


@dataclass(frozen=True, slots=True)
class _Storage:
    key: int
    tensor: torch.Tensor


class _Pickler(pickle.Pickler):
    """Each tensor as a contiguous view of a storage of its own."""

    def __init__(self, file: IO[bytes], protocol: int):
        super().__init__(file, protocol)
        self.tensors: list[torch.Tensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if obj.dtype not in _CLASSES:
            raise UserError(f"torch files cannot hold {obj.dtype}: choose another --dtype")
        self.tensors.append(obj)
        storage = _Storage(len(self.tensors) - 1, obj)
        shape, strides = tuple(obj.shape), _contiguous(obj.shape)
        return _rebuild_tensor_v2, (storage, 0, shape, strides, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _CLASSES[obj.tensor.dtype], str(obj.key), "cpu", math.prod(obj.tensor.shape)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    """The strides of rows that stand one after the other."""
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))
