"""Where the records of an uncompressed zip lie in its file, or in a part of a file: torch.save's archives."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES

_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_CENTRAL = struct.Struct("<4s24xHHH12x")  # and of the comment
_POLYNOMIAL = 0xEDB88320  # of CRC-32, the lowest power in the highest bit
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One record; offsets are absolute, in bytes."""

    name: str
    header: int  # of its local header
    offset: int  # of its bytes
    size: int
    crc: int


class Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if (at := offset + (0, self._at, self._size)[whence]) < 0:
            raise OSError("a place before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = max(0, min(len(buffer), self._size - self._at))
        read = self._file.readinto(memoryview(buffer)[:wanted])  # pyright: ignore[reportAttributeAccessIssue]
        self._at += read
        return read


def read_records(file: IO[bytes], path: Path, start: int = 0, size: int | None = None) -> dict[str, Record]:
    """The records by name, in the order of their bytes.

    `size` bytes from `start` on are the archive. UserError for one that is truncated, compressed, encrypted, or whose
    records overlap, come twice or lie outside.
    """
    if size is None:
        size = file.seek(0, io.SEEK_END) - start
    part = Part(file, start, size)
    try:
        with zipfile.ZipFile(part) as archive:  # pyright: ignore[reportArgumentType]
            directory = archive.start_dir
            found = [_record(part, info, start) for info in archive.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged ({error}): copy or download it again") from error
    return _apart(sorted(found, key=lambda record: record.header), start + directory, path)


def _record(part: Part, info: zipfile.ZipInfo, start: int) -> Record:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"{info.filename} is compressed, which torch.save does not do")
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{info.filename} is encrypted")
    part.seek(info.header_offset)
    signature, name, extra = _LOCAL.unpack(part.read(_LOCAL.size))
    if signature != b"PK\3\4" or part.read(name) != info.orig_filename.encode():
        raise ValueError(f"{info.filename} is not where the table of contents says")
    offset = start + info.header_offset + _LOCAL.size + name + extra
    return Record(info.filename, start + info.header_offset, offset, info.file_size, info.CRC)


def _apart(records: list[Record], end: int, path: Path) -> dict[str, Record]:
    """By name; UserError if one begins before the one before it ends."""
    if not records:
        raise UserError(f"{path} is damaged (an archive in it is empty): copy or download it again")
    ends = [record.offset + record.size for record in records]
    for record, stop, limit in zip(records, ends, [*(record.header for record in records[1:]), end], strict=True):
        if stop > limit:
            raise UserError(
                f"{path} is damaged ({record.name} ends at byte {stop}, after {limit} where the next thing begins):"
                " copy or download it again"
            )
    table = {record.name: record for record in records}
    if len(table) != len(records):
        twice = next(name for name in table if sum(record.name == name for record in records) > 1)
        raise UserError(f"{path} is damaged ({twice} comes twice): copy or download it again")
    return table


def crc_of(file: IO[bytes], record: Record, advance: Callable[[int], None] | None = None) -> int:
    """The CRC-32 of a record's bytes as they are; threads may share the file, `advance` hears of each piece."""
    crc, end = 0, record.offset + record.size
    for start in range(record.offset, end, CHUNK_BYTES):
        chunk = os.pread(file.fileno(), min(CHUNK_BYTES, end - start), start)
        crc = zlib.crc32(chunk, crc)
        if advance:
            advance(len(chunk))
    return crc


def directory_entries(file: IO[bytes], path: Path) -> dict[str, int]:
    """Where each record's entry in the table of contents lies, by name, for an archive that read_records took."""
    with zipfile.ZipFile(file) as archive:
        place, count = archive.start_dir, len(archive.infolist())
    entries = {}
    for _ in range(count):
        file.seek(place)
        signature, *lengths = _CENTRAL.unpack(file.read(_CENTRAL.size))
        if signature != b"PK\1\2":
            raise UserError(f"{path} is damaged (its table of contents ends early): write it again")
        entries[file.read(lengths[0]).decode()] = place
        place += _CENTRAL.size + sum(lengths)
    return entries


def combined_crc(first: int, second: int, size: int) -> int:
    """The CRC-32 of two pieces one after the other, from their own; `size` is the second's, in bytes."""
    shift, power, bits = 1 << 31, 1 << 30, 8 * size  # x**0, x**1
    while bits:
        if bits & 1:
            shift = _times(power, shift)
        power, bits = _times(power, power), bits >> 1
    return _times(shift, first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials, modulo CRC-32's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
