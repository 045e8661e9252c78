"""The .bin/.idx format: golden bytes made by hand, refusals, joining."""

import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from data_help import facts
from fuzz import mmap_files, old_files

from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader, Writer, token_dtype
from llmpipe.data.dataset.join import join
from llmpipe.errors import UserError

# Written by hand from the format's description: two documents, [1, 2, 258] and [65535], in uint16.
GOLDEN_BIN = bytes.fromhex("0100 0200 0201 ffff")
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000"  # MMIDIDX\0\0
    "0100000000000000 08"  # version 1, type code 8
    "0200000000000000 0300000000000000"  # 2 sequences, 3 entries in the document index
    "03000000 01000000"  # sizes
    "0000000000000000 0600000000000000"  # pointers
    "0000000000000000 0100000000000000 0200000000000000"  # document index
)


def write(prefix: Path, *documents: list[int], dtype: type = np.uint16) -> Path:
    with Writer(prefix, np.dtype(dtype)) as writer:
        for tokens in documents:
            writer.add(np.array(tokens, dtype), np.array([len(tokens)]))
    return prefix


def golden(prefix: Path, idx: bytes = GOLDEN_IDX, data: bytes = GOLDEN_BIN) -> Path:
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    return prefix


def test_writer_makes_the_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.b", [1, 2, 258], [65535])
    assert (tmp_path / "a.b.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "a.b.idx").read_bytes() == GOLDEN_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_reader_reads_the_golden_bytes(tmp_path: Path) -> None:
    reader = Reader(golden(tmp_path / "g"))
    assert [reader.read(i).tolist() for i in range(reader.num_documents)] == [[1, 2, 258], [65535]]
    assert reader.read(0, 1, 1).tolist() == [2]
    assert reader.read(0, 2, 9).tolist() == [258]
    assert reader.lengths.tolist() == [3, 1]
    assert reader.dtype == np.uint16


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")], ids=str
)
def test_reader_knows_every_type_of_tokens(tmp_path: Path, code: int, dtype: str) -> None:
    """A file laid out by struct alone, with documents of two, no and one sequences."""
    tokens, width = np.array([5, 6, 7, 8], dtype), np.dtype(dtype).itemsize
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 3, 4)
    idx += struct.pack("<3i3q4q", 2, 1, 1, 0, 2 * width, 3 * width, 0, 2, 2, 3)
    reader = Reader(golden(tmp_path / "g", idx, tokens.tobytes()))
    assert [reader.read(i).tolist() for i in range(3)] == [[5, 6, 7], [], [8]]
    assert reader.dtype == np.dtype(dtype)


def files(prefix: Path, parts: dict[str, bytes]) -> Path:
    return golden(prefix, parts["idx"], parts["bin"])


@pytest.mark.parametrize("dtype", ["<f8", "<f4"])
def test_type_code_7_is_the_width_that_the_bin_has(tmp_path: Path, dtype: str) -> None:
    """float64 in Megatron-LLM, float32 in Megatron-LM."""
    reader = Reader(files(tmp_path / "g", mmap_files(7, dtype, [2, 3], [0, 1, 2])))
    assert [reader.read(i).tolist() for i in range(2)] == [[0, 1], [2, 3, 4]]
    assert reader.dtype == np.dtype(dtype)


def test_instruction_files_have_a_document_a_sequence(tmp_path: Path) -> None:
    reader = Reader(files(tmp_path / "g", mmap_files(8, "<u2", [2, 0, 3], [0])))
    assert [reader.read(i).tolist() for i in range(reader.num_documents)] == [[0, 1], [], [2, 3, 4]]


def test_floating_point_numbers_that_are_no_tokens_are_refused(tmp_path: Path) -> None:
    for value in (0.5, -1.0, float("nan"), float("inf"), 2.0**31):
        parts = mmap_files(6, "<f8", [2, 1], [0, 1, 2], np.array([0, 1, value]))
        with pytest.raises(UserError, match=r"g.bin holds .* as token 2, which is no token id"):
            Reader(files(tmp_path / "g", parts))


OLD_IDX = old_files(4, "<i4", 4, [3, 1], [0, 1, 2])["idx"]


def old_changed(number: int, value: int) -> bytes:
    """The older index with one of its int64 numbers (0: the version) changed."""
    return OLD_IDX[: 8 + 8 * number] + struct.pack("<q", value) + OLD_IDX[16 + 8 * number :]


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (OLD_IDX[:40], "g.idx is truncated: 40 bytes, but the header alone needs 56"),
        (OLD_IDX[:-8], "g.idx is truncated: 136 bytes, but 2 sequences need 144"),
        (OLD_IDX + b"\0", "g.idx has bytes too many (a multimodal dataset of Megatron?): 145 bytes"),
        (old_changed(0, 2), "g.idx has version 2; llmpipe reads version 1"),
        (old_changed(1, 9), "g.idx has type code 9, which is no type of tokens"),
        (old_changed(2, 3), "its sequences lie from 0 to 4 in units of 3 bytes"),
        (old_changed(7, 2), "g.idx is damaged, or no index of tokens: not every sequence has one size"),
        (old_changed(10, -1), "its sequences lie from -1 to 4 in units of 4 bytes; tokenize the corpus again"),
        (
            old_changed(10, 2),
            "sequence 1 starts at byte 8, but the sizes before it say byte 12; tokenize",
        ),
        (old_changed(12, -3), "g.idx is damaged: it has sequences of -3 to 1 tokens"),
        (old_changed(16, 5), "the document index ends at sequence 5, but there are 2 sequences"),
    ],
    ids=map(str, range(11)),
)
def test_reader_refuses_a_damaged_older_index(tmp_path: Path, idx: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        Reader(golden(tmp_path / "g", idx, np.arange(4, dtype="<i4").tobytes()))
    assert message in str(error.value)


def test_an_older_dataset_is_joined_into_the_newest_format(tmp_path: Path) -> None:
    files(tmp_path / "old", old_files(6, "<f8", 4, [3, 1], [0]))
    join([tmp_path / "old", tmp_path / "old"], tmp_path / "new")
    reader = Reader(tmp_path / "new")
    assert [reader.read(i).tolist() for i in range(4)] == [[0, 1, 2], [3], [0, 1, 2], [3]]
    assert reader.dtype == np.int32


def test_what_is_not_the_file_of_the_manifest_is_refused(tmp_path: Path) -> None:
    manifest.write(write(tmp_path / "d", [1, 2], [3]), {})
    manifest.check(tmp_path / "d")
    (tmp_path / "d.bin").write_bytes(b"\1\0\2\0\4\0")
    with pytest.raises(UserError, match=r"d.bin is damaged: its SHA-256 is .*, its manifest says .*; tokenize"):
        manifest.check(tmp_path / "d")
    (tmp_path / "d.bin").write_bytes(b"\1\0")
    with pytest.raises(UserError, match=r"d.bin is damaged: 2 bytes, its manifest says 6; tokenize the corpus again"):
        manifest.check(tmp_path / "d")


def changed(at: int, value: bytes) -> bytes:
    return GOLDEN_IDX[:at] + value + GOLDEN_IDX[at + len(value) :]


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (GOLDEN_IDX[:20], "g.idx is truncated: 20 bytes, but the header alone needs 34"),
        (GOLDEN_IDX[:-5], "g.idx is truncated: 77 bytes, but 2 sequences need 82"),
        (GOLDEN_IDX + b"\0\0", "g.idx has bytes too many (a multimodal dataset of Megatron?): 84 bytes"),
        (changed(0, b"PK"), "g.idx is not an index of Megatron's mmap format: it starts with b'PKIDIDX"),
        (changed(9, b"\2"), "g.idx has version 2; llmpipe reads version 1"),
        (changed(17, b"\x09"), "g.idx has type code 9, which is no type of tokens; known: [1, 2, 3, 4, 5, 6, 7, 8]"),
        (changed(17, b"\4"), "sequence 1 starts at byte 6, but the sizes before it say byte 12; tokenize"),
        (changed(34, b"\xff\xff\xff\xff"), "sequence 0 has -1 tokens"),
        (
            changed(74, b"\3"),
            "the document index ends at sequence 3, but there are 2 sequences; tokenize the corpus again",
        ),
    ],
    ids=map(str, range(10)),
)
def test_reader_refuses_a_damaged_index(tmp_path: Path, idx: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        Reader(golden(tmp_path / "g", idx))
    assert message in str(error.value)


def test_reader_refuses_a_truncated_bin(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Reader(golden(tmp_path / "g", data=GOLDEN_BIN[:-2]))
    assert "g.idx does not fit" in str(error.value)
    assert "the index describes 8 bytes of tokens, but the .bin has 6; tokenize the corpus again" in str(error.value)


def test_reader_names_the_missing_file(tmp_path: Path) -> None:
    golden(tmp_path / "g")
    (tmp_path / "g.idx").unlink()
    with pytest.raises(UserError, match=r"g.idx is missing: .*g is not a finished dataset; llmpipe tokenize makes one"):
        Reader(tmp_path / "g")


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(32_000, "uint16"), (65_499, "uint16"), (65_500, "int32"), (128_256, "int32")]
)
def test_type_of_a_vocabulary(vocab: int, dtype: str) -> None:
    assert token_dtype(vocab) == np.dtype(dtype)


def test_empty_dataset_can_be_read(tmp_path: Path) -> None:
    assert Reader(write(tmp_path / "none")).num_documents == 0


def test_nothing_appears_when_the_block_fails_and_the_old_stays(tmp_path: Path) -> None:
    write(tmp_path / "d", [1, 2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), Writer(tmp_path / "d", np.dtype(np.uint16)) as writer:
        writer.add(np.array([9]), np.array([1]))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_document_too_long_for_the_format_is_refused(tmp_path: Path) -> None:
    endless = np.broadcast_to(np.uint16(7), 2**31)  # one token in memory
    message = "document 1 has 2,147,483,648 tokens, but the format takes 2,147,483,647: cut it up"
    with pytest.raises(UserError, match=message), Writer(tmp_path / "d", np.dtype(np.uint16)) as writer:
        writer.add(np.array([1]), np.array([1]))
        writer.add(endless, np.array([2**31]))
    assert list(tmp_path.iterdir()) == []


def test_a_new_dataset_takes_the_old_manifest_away(tmp_path: Path) -> None:
    write(tmp_path / "d", [1, 2])
    manifest.write(tmp_path / "d", {})
    write(tmp_path / "d", [3])
    assert manifest.read(tmp_path / "d") is None


def test_join_lays_datasets_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.data.dataset.join.CHUNK_BYTES", 16)  # several parts, some within one document
    first = [list(range(20)), [1], [], [2, 3], list(range(9))]
    with Writer(tmp_path / "b", np.dtype(np.uint16)) as writer:  # a document of two sequences
        writer.add(np.arange(5), np.array([2, 3]), np.array([2]))
    write(tmp_path / "a", *first)
    manifest.write(tmp_path / "a", facts(documents=5, tokens=32))
    manifest.write(tmp_path / "b", facts(tokens=5, empty_documents=1))
    join([tmp_path / "a", tmp_path / "b"], tmp_path / "out" / "joined")

    reader = Reader(tmp_path / "out" / "joined")
    assert [reader.read(i).tolist() for i in range(6)] == [*first, list(range(5))]
    assert reader.sizes.tolist() == [20, 1, 0, 2, 9, 2, 3]
    assert reader.documents.tolist() == [0, 1, 2, 3, 4, 5, 7]
    joined = manifest.read(tmp_path / "out" / "joined")
    assert joined and (joined["documents"], joined["tokens"], joined["empty_documents"]) == (6, 37, 1)
    assert joined["sources"] == [{"path": "aa"}, {"path": "aa"}]


def test_join_refuses_another_tokenizer(tmp_path: Path) -> None:
    for name, sha256 in (("a", "aa"), ("b", "bb")):
        manifest.write(write(tmp_path / name, [1]), facts(sha256))
    with pytest.raises(
        UserError, match=r"b was made by the tokenizer bb/tokenizer.model, .*a by aa/tokenizer.model, which"
    ):
        join([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_join_refuses_another_type_and_its_own_output(tmp_path: Path) -> None:
    write(tmp_path / "a", [1])
    write(tmp_path / "b", [1], dtype=np.int32)
    with pytest.raises(UserError, match=r"b has int32 tokens, .*a has uint16: only datasets of one tokenizer"):
        join([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(UserError, match=r"--output .*a is one of the datasets to join: give it another name"):
        join([tmp_path / "a"], tmp_path / "a")


def test_join_without_a_manifest_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a", [1])
    join([tmp_path / "a", tmp_path / "a"], tmp_path / "c")
    assert "c gets no manifest: not all of its sources have one" in caplog.text
    assert manifest.read(tmp_path / "c") is None


def test_digest_is_of_the_bytes_with_or_without_a_manifest(tmp_path: Path) -> None:
    write(tmp_path / "a", [1, 2])
    write(tmp_path / "b", [1, 2])
    write(tmp_path / "c", [1, 3])
    bare = manifest.digest(tmp_path / "a")
    manifest.write(tmp_path / "a", facts())
    assert manifest.digest(tmp_path / "a") == bare == manifest.digest(tmp_path / "b") != manifest.digest(tmp_path / "c")


def test_a_writer_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit is an OSError, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), Writer(tmp_path / "a", np.dtype(np.uint16)) as writer:
            for _ in range(100):
                writer.add(np.zeros(1000), np.array([1000]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_prefix_has_a_name() -> None:
    with pytest.raises(UserError, match=r"--output \. has no name of its own: name a prefix, as in corpus"):
        Writer(Path(), np.dtype(np.uint16))
