"""Damaged datasets: files with bits flipped, cut, lengthened or overwritten, opened and read in this process.

Run by a test with some thousands of files; `python tests/data/fuzz.py 20000` makes that many of each of the six kinds.
"""

import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmpipe import helpers
from llmpipe.data.batches.sampling import Samples
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader
from llmpipe.errors import UserError

Files = dict[str, bytes]
Tokens = np.ndarray | None
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mmap_files(code: int, dtype: str, sizes: list[int], documents: list[int], text: Tokens = None) -> Files:
    """The files of Megatron's format, by struct alone; the tokens count up if none are given."""
    tokens, count = (np.arange(sum(sizes)) if text is None else text).astype(dtype), len(sizes)
    pointers = [sum(sizes[:number]) * tokens.itemsize for number in range(count)]
    numbers = struct.pack(f"<{count}i{count}q{len(documents)}q", *sizes, *pointers, *documents)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, count, len(documents))
    return {"bin": tokens.tobytes(), "idx": header + numbers}


def old_files(code: int, dtype: str, unit: int, sizes: list[int], documents: list[int], text: Tokens = None) -> Files:
    """The files of the older format, by struct alone."""
    tokens, count = (np.arange(sum(sizes)) if text is None else text).astype(dtype), len(sizes)
    starts = [sum(sizes[:number]) * tokens.itemsize // unit for number in range(count + 1)]
    numbers = struct.pack(f"<{3 * count + 2 + len(documents)}q", *range(count + 1), *starts, *sizes, *documents)
    header = struct.pack("<8sQQQQQQ", b"TNTIDX\0\0", 1, code, unit, count, count, len(documents))
    return {"bin": tokens.tobytes(), "idx": header + numbers}


SOUND = [
    mmap_files(8, "<u2", [3, 0, 9, 4, 1], [0, 1, 2, 3, 4, 5]),
    mmap_files(4, "<i4", [5, 2, 2, 7], [0, 1, 1, 4]),
    mmap_files(7, "<f4", [4, 3], [0, 1, 2]),
    mmap_files(8, "<u2", [6, 1, 2], [0]),
    old_files(4, "<i4", 4, [3, 5, 1], [0, 2, 3]),
    old_files(6, "<f8", 4, [2, 4], [0]),
]


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes with one kind of damage."""
    kind, at = random.integers(5), int(random.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + random.bytes(int(random.integers(1, 40)))
    if kind == 2:
        value = struct.pack("<Q", EXTREMES[random.integers(len(EXTREMES))])
        return data[:at] + value[: len(data) - at] + data[at + 8 :]
    changed = bytearray(data)
    for _ in range(1 if kind == 3 else int(random.integers(2, 9))):
        changed[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def outcome(prefix: Path) -> str:
    """What becomes of a damaged dataset: refused, known by its hash alone, or read with what is in its .bin."""
    try:
        reader = Reader(prefix)
    except UserError as error:
        assert str(prefix) in str(error)
        return "refused"
    stored = np.fromfile(manifest.bin_path(prefix), reader.dtype)
    assert np.array_equal(np.concatenate([reader.read(d) for d in range(reader.num_documents)]), stored)
    samples = Samples(prefix, [1, 0, 0], "train", 4, 5, 0)
    for index in range(len(samples)):
        assert np.isin(samples[index][0], stored.astype(np.int64)).all()
    return "read"


def fuzz(folder: Path, count: int, seed: int) -> Counter[str]:
    """Damage, open and read `count` copies of each sound dataset; each is refused, or known by its manifest's hash."""
    random, found = np.random.default_rng(seed), Counter[str]()
    for number, sound in enumerate(SOUND):
        prefix = folder / f"d{number}"
        paths = {"bin": manifest.bin_path(prefix), "idx": manifest.idx_path(prefix)}
        for name, data in sound.items():
            paths[name].write_bytes(data)
        manifest.write(prefix, {})
        assert outcome(prefix) == "read"
        for _ in range(count):
            name = ("idx", "idx", "idx", "bin")[random.integers(4)]
            if (data := damaged(sound[name], random)) != sound[name]:
                paths[name].write_bytes(data)
                found[outcome(prefix)] += 1
                with pytest.raises(UserError, match=f"{paths[name]} is damaged"):
                    manifest.check(prefix)
            paths[name].write_bytes(sound[name])
    return found


def fuzz_helpers(count: int, seed: int) -> Counter[str]:
    """Wild arrays for the functions that read tokens: refused, or read inside them."""
    random, found = np.random.default_rng(seed), Counter[str]()
    for _ in range(count):
        tokens = np.arange(20, dtype=np.uint16)
        starts = np.sort(random.choice(np.array([0, 0, 3, 7, 20, 21, -1, 2**62]), 5))
        documents = random.integers(-1, 6, 6).astype(np.int32)
        samples, order = random.integers(-1, 7, 12), random.integers(0, 7, 5).astype(np.uint32)
        try:
            rows, _, _ = helpers.read_samples(tokens, starts, documents, samples, order, random.integers(-1, 6, 2), 3)
        except ValueError:
            found["refused"] += 1
        else:
            assert ((rows >= 0) & (rows < 20)).all()
            found["read"] += 1
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(fuzz(Path(scratch), int(sys.argv[1]), 1), fuzz_helpers(int(sys.argv[1]), 1))
