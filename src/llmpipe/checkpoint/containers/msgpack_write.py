"""The bytes of EasyLM's streaming files between the arrays' own bytes; see msgpack_file for the format.

The bytes are those that msgpack and flax write themselves, save that an array of more than 1 GiB is cut between rows.
"""

import math
import struct

import torch

from llmpipe.checkpoint.containers.msgpack_file import CHUNKED
from llmpipe.errors import UserError

_CHUNK_BYTES = 1 << 30  # flax's MAX_CHUNK_SIZE
_RECORD_BYTES = (1 << 31) - 1  # msgpack's Unpacker, as EasyLM opens it, reads no larger value


def record_heads(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chunk_bytes: int = _CHUNK_BYTES
) -> list[tuple[bytes, slice]]:
    """What stands before each run of an array's rows in its record, and the rows; a vector is one row.

    `name` is the keys joined with "/". UserError if EasyLM could not read the record.
    """
    rows = shape[0] if len(shape) == 2 else 1
    row_bytes = math.prod(shape) // rows * dtype.itemsize
    if rows * row_bytes <= chunk_bytes:
        heads = [(_array_head(shape, dtype), slice(0, rows))]
    else:
        heads = _chunk_heads(shape, dtype, max(1, chunk_bytes // row_bytes))
    size = sum(len(head) for head, _ in heads) + rows * row_bytes
    if size > _RECORD_BYTES:
        raise UserError(
            f"{name} has {rows * row_bytes:,} bytes in {str(dtype).removeprefix('torch.')}, but EasyLM's streaming"
            " format can be read up to 2 GiB a tensor: choose --dtype bf16, or another format"
        )
    keys = name.split("/")
    key = b"\x92" + _sized(len(keys), 0x90, 16, (None, b"\xdc", b"\xdd")) + b"".join(_text(key) for key in keys)
    heads[0] = (key + _bin(size) + heads[0][0], heads[0][1])
    return heads


def _chunk_heads(shape: tuple[int, ...], dtype: torch.dtype, at_once: int) -> list[tuple[bytes, slice]]:
    rows, width = shape
    runs = [slice(first, min(first + at_once, rows)) for first in range(0, rows, at_once)]
    sizes = b"\x82" + b"".join(_text(str(number)) + _whole(size) for number, size in enumerate(shape))
    before = b"\x83" + _text(CHUNKED) + b"\xc3" + _text("shape") + sizes + _text("chunks") + _map(len(runs))
    heads = [
        (_text(str(number)) + _array_head(((run.stop - run.start) * width,), dtype), run)
        for number, run in enumerate(runs)
    ]
    return [(before + heads[0][0], runs[0]), *heads[1:]]


def _array_head(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Extension 1 around (shape, dtype's name, bytes), up to the bytes."""
    size = math.prod(shape) * dtype.itemsize
    sizes = _sized(len(shape), 0x90, 16, (None, b"\xdc", b"\xdd")) + b"".join(_whole(size) for size in shape)
    inner = b"\x93" + sizes + _text(str(dtype).removeprefix("torch.")) + _bin(size)
    whole = len(inner) + size
    fixed = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}
    head = fixed.get(whole) or _sized(whole, 0, 0, (b"\xc7", b"\xc8", b"\xc9"))
    return head + b"\x01" + inner


def _text(text: str) -> bytes:
    data = text.encode()
    return _sized(len(data), 0xA0, 32, (b"\xd9", b"\xda", b"\xdb")) + data


def _bin(size: int) -> bytes:
    return _sized(size, 0, 0, (b"\xc4", b"\xc5", b"\xc6"))


def _map(size: int) -> bytes:
    return _sized(size, 0x80, 16, (None, b"\xde", b"\xdf"))


def _whole(number: int) -> bytes:
    if number < 1 << 32:
        return _sized(number, 0, 128, (b"\xcc", b"\xcd", b"\xce"))
    return b"\xcf" + struct.pack(">Q", number)


def _sized(size: int, fixed: int, fixed_below: int, codes: tuple[bytes | None, bytes, bytes]) -> bytes:
    """A length in the fewest bytes: within the code itself, or after one of three codes for 1, 2 and 4 bytes."""
    if size < fixed_below:
        return bytes([fixed + size])
    for code, layout in zip(codes, (">B", ">H", ">I"), strict=True):
        if code and size < 1 << 8 * struct.calcsize(layout):
            return code + struct.pack(layout, size)
    raise UserError(f"a tensor of {size:,} bytes is too large for a msgpack file: choose --dtype bf16")
