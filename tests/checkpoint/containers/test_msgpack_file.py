"""Files packed byte by byte here are the judge of what is read; crafted ones of what is refused."""

import random
import resource
import struct
from pathlib import Path

import pytest
import torch

from easylm_files import chunked, pack, write_nested, write_stream
from llmpipe.checkpoint.containers.msgpack_file import StoredArray, looks_like_msgpack, read_msgpack
from llmpipe.checkpoint.containers.msgpack_write import record_heads
from llmpipe.errors import UserError

DTYPES = (
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
    torch.float16, torch.float32, torch.float64, torch.bfloat16,
)  # fmt: skip


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


TENSORS = (
    {
        "transformer/wte/embedding": filled(7, 5),
        "transformer/h/0/attention/wq/kernel": filled(5, 3, dtype=torch.bfloat16),
        "transformer/h/10/ffn_norm/kernel": filled(70_000),  # a length of more than 16 bits
        "lm_head/kernel": filled(5, 60, dtype=torch.float16),
        "a" * 40: filled(1),  # a key of more than 31 bytes
    }
    | {f"types/{str(dtype)[6:]}": filled(3, dtype=dtype) for dtype in DTYPES}
)


def value(array: StoredArray) -> torch.Tensor:
    data = array.file.read_bytes()
    flat = b"".join(data[offset : offset + count * array.dtype.itemsize] for offset, count in array.pieces)
    return torch.frombuffer(bytearray(flat), dtype=array.dtype).view(array.shape)


def check(path: Path, tensors: dict[str, torch.Tensor], streaming: bool) -> None:
    found = read_msgpack(path)
    assert found.streaming == streaming and list(found.arrays) == list(tensors)
    for name, tensor in tensors.items():
        array = found.arrays[name]
        assert (array.shape, array.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert torch.equal(value(array), tensor), name


@pytest.mark.parametrize("chunk", [None, 7, 64])
def test_streaming_and_nested_files_hold_what_was_packed(tmp_path: Path, chunk: int | None) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if chunk is None or tensor.numel() < 1000}
    check(write_stream(tmp_path / "stream", tensors, chunk=chunk), tensors, True)
    check(write_nested(tmp_path / "nested", tensors, chunk), tensors, False)
    assert looks_like_msgpack(tmp_path / "stream") and looks_like_msgpack(tmp_path / "nested")


def test_chunks_are_taken_by_their_numbers(tmp_path: Path) -> None:
    table = chunked(filled(12), 1)  # "10" is before "2" in a sorted file
    table["chunks"] = dict(sorted(table["chunks"].items()))
    (tmp_path / "nested").write_bytes(pack({"kernel": table}))
    check(tmp_path / "nested", {"kernel": filled(12)}, False)


def test_other_values_beside_arrays_are_left_out(tmp_path: Path) -> None:
    tree = {"step": 5000, "lr": 0.5, "name": "adam", "none": None, "flag": True, "far": -9, "raw": b"12",
            "list": [filled(2), {"x": filled(1)}], "scalar": filled()}  # fmt: skip
    complex_number = b"\xc7\x13\x02" + pack([1.0, 2.0])
    (tmp_path / "nested").write_bytes(pack(tree))
    check(tmp_path / "nested", {"list/0": filled(2), "list/1/x": filled(1), "scalar": filled()}, False)
    (tmp_path / "stream").write_bytes(pack([["step"], pack(3)]) + pack([["z"], complex_number]))
    assert read_msgpack(tmp_path / "stream").arrays == {}


def test_no_array_is_read_into_memory(tmp_path: Path) -> None:
    """A gigabyte, most of it a hole in the file."""
    size = 1 << 30
    inner = b"\x93" + pack([size // 4]) + pack("float32") + b"\xc6" + struct.pack(">I", size)
    extension = b"\xc9" + struct.pack(">I", len(inner) + size) + b"\x01" + inner
    with (tmp_path / "stream").open("wb") as file:
        file.write(b"\x92" + pack(["big"]) + b"\xc6" + struct.pack(">I", len(extension) + size) + extension)
        start = file.tell()
        file.truncate(start + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (array,) = read_msgpack(tmp_path / "stream").arrays.values()
    assert array.pieces == ((start, size // 4),)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, streaming: bool) -> None:
    tensors = {"transformer/wte/embedding": filled(3, 2), "lm_head/kernel": filled(2, 3, dtype=torch.float16)}
    path = (write_stream if streaming else write_nested)(tmp_path / "whole", tensors)
    data = path.read_bytes()
    first = len(pack([["transformer", "wte", "embedding"], pack(filled(3, 2))]))
    for end in range(len(data)):
        path.write_bytes(data[:end])
        if streaming and end == first:
            assert len(read_msgpack(path).arrays) == 1  # whole records: the model's table says what is missing
            continue
        with pytest.raises(UserError, match=r"whole is truncated.*copy or download it again"):
            read_msgpack(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match=f"truncated, damaged .* of {len(data) + 1}"):
        read_msgpack(path)


BAD = {
    "an unknown extension": pack({"a": 1})[:-1] + b"\xd4\x05\x00",
    "a reserved byte": b"\x81\xa1a\xc1",
    "lists without an end": b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 60,
    "a map of four billion": b"\xdf\xff\xff\xff\xff\xa1a\x00",
    "an array of values without an end": b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x00" * 1_100_000,
    "deep nesting": b"\x81\xa1a" * 5000 + b"\x00",
    "a huge key": b"\x81\xdb\x10\x00\x00\x00" + b"a" * 100,
    "a key that is no text": pack({1: filled(2)}),
    "a key twice": b"\x82" + 2 * (pack("a") + pack(filled(2))),
    "text that is not UTF-8": b"\x81\xa1\xff\x00",
    "bytes that do not fit the shape": pack({"a": filled(6)}).replace(b"\x91\x06", b"\x91\x07"),
    "a shape below zero": pack({"a": filled(6)}).replace(b"\x91\x06", b"\x91\xfa"),
    "an unknown dtype": pack({"a": filled(6)}).replace(b"float32", b"float23"),
    "an object dtype": pack({"a": filled(6)}).replace(b"\xa7float32", b"\xa7object0"),
    "a shape that is no list": pack({"a": filled(6)}).replace(b"\x91\x06", b"\x06"),
    "a chunked array without chunks": pack({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}}}),
    "a chunked array that is not filled": pack(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 9}, "chunks": {"0": filled(8)}}}
    ),
    "chunks of two types": pack(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4},
               "chunks": {"0": filled(2), "1": filled(2, dtype=torch.int32)}}}
    ),
    "a chunk left out": pack(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": filled(2), "2": filled(2)}}}
    ),
    "a record of three": b"\x92" + pack(["a"]) + pack(pack(1)) + pack([["a"], pack(1), 1]),
    "a record without bytes": pack([["a"], 1]),
    "a record whose keys are numbers": pack([[1], pack(filled(2))]),
    "a record without keys": pack([[], pack(filled(2))]),
    "a record with bytes after its value": pack([["a"], pack(1) + b"\x00"]),
    "a record twice": 2 * pack([["a"], pack(filled(2))]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_crafted_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad").write_bytes(BAD[name])
    with pytest.raises(UserError, match=r"bad is truncated, damaged or no msgpack file"):
        read_msgpack(tmp_path / "bad")


def test_random_damage_is_an_error_or_a_whole_reading(tmp_path: Path) -> None:
    """Never anything but UserError, and never bytes beyond the file."""
    chance = random.Random(3)
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.numel() < 1000}
    for write in (write_stream, write_nested):
        data = write(tmp_path / "file", tensors).read_bytes()
        for _ in range(120):
            damaged = bytearray(data)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(data))] = chance.randrange(256)
            (tmp_path / "file").write_bytes(damaged)
            try:
                arrays = read_msgpack(tmp_path / "file").arrays
            except UserError:
                continue
            for array in arrays.values():
                assert all(offset + count * array.dtype.itemsize <= len(data) for offset, count in array.pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (1, 1), (7, 5), (300, 41), (200, 100), (70_000,)])
def test_heads_and_bytes_make_the_record_that_flax_writes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = filled(*shape).to(dtype)
    data = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    ((head, rows),) = record_heads("transformer/h/11/attention/wq/kernel", shape, dtype)
    assert head + data == pack([["transformer", "h", "11", "attention", "wq", "kernel"], pack(tensor)])
    assert rows == slice(0, shape[0] if len(shape) == 2 else 1)


def test_a_large_array_is_cut_between_rows(tmp_path: Path) -> None:
    tensor, data = filled(11, 6), b""
    for head, rows in record_heads("lm_head/kernel", (11, 6), torch.float32, chunk_bytes=100):
        data += head + bytes(tensor[rows].reshape(-1).view(torch.uint8).numpy())
    (tmp_path / "stream").write_bytes(data)
    check(tmp_path / "stream", {"lm_head/kernel": tensor}, True)
    assert data == pack([["lm_head", "kernel"], pack(chunked(tensor, 24))])  # 4 rows of 6


def test_a_tensor_that_easylm_could_not_read_is_refused() -> None:
    assert len(record_heads("lm_head/kernel", (8192, 128256), torch.bfloat16)) == 2  # Llama-3-70B's
    with pytest.raises(UserError, match=r"4,202,692,608 bytes in float32, but .* 2 GiB a tensor: choose --dtype bf16"):
        record_heads("lm_head/kernel", (8192, 128256), torch.float32)
