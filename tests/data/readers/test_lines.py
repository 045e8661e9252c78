"""JSON lines, packed and plain, whole and in spans: rows, and the text of every refusal."""

import gzip
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from llmpipe.data.readers import lines
from llmpipe.data.readers.block import BadRow, Span, whole
from llmpipe.errors import UserError

PACKERS: dict[str, Callable[[bytes], Any]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def read(span: Span) -> list[tuple[int, Any]]:
    """The rows of a span, numbered in the file."""
    return [(block.line(number), row) for block in lines.blocks(span, (), ()) for number, row in block.rows()]


def bad(path: Path, data: bytes) -> str:
    """Of a file whose third line is bad: what is told."""
    path.write_bytes(PACKERS[path.name.removeprefix("c")](data))
    found = [
        f"{block.where(number)} {row}"
        for block in lines.blocks(whole(path), (), ())
        for number, row in block.rows()
        if isinstance(row, BadRow)
    ]
    assert len(found) == 1
    return found[0].removeprefix(f"{path.parent}/")


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("block_bytes", [1 << 20, 40, 7])
def test_rows_of_every_packing_and_block(
    tmp_path: Path, suffix: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(lines, "READ_BYTES", 1 + block_bytes // 2)
    texts = ["one", "", "line\u2028separator", "\U0001f600", 'quote " and \\ and \n', "x" * 300]
    written = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    data = "\r\n".join([written[0], "  ", *written[1:]]).encode()  # a blank line, and no newline at the end
    path = tmp_path / f"c{suffix}"
    path.write_bytes(PACKERS[suffix](data))
    numbers = [1, 3, 4, 5, 6, 7]
    assert read(whole(path)) == [(numbers[i], {"id": i, "text": text}) for i, text in enumerate(texts)]
    if suffix == ".jsonl":
        assert sum(block.read for block in lines.blocks(whole(path), (), ())) == path.stat().st_size


@pytest.mark.parametrize("block_bytes", [1 << 20, 9])
def test_spans_share_no_row_and_lose_none(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of the file gives each row once, in the span of its first byte, with its line of the whole file."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(lines, "READ_BYTES", 1 + block_bytes // 2)
    written = [f"[{'7' * length}]".replace("[]", "[1]") for length in (1, 30, 0, 2, 14, 1, 50)]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join([*written[:3], "", *written[3:]]))
    size, numbers = path.stat().st_size, [1, 2, 3, 5, 6, 7, 8]
    starts = [path.read_bytes().index(line.encode() + b"\n"[: i < 6]) for i, line in enumerate(written)]
    starts[3:] = [path.read_text().index(written[3], starts[2] + 4), *starts[4:]]
    starts[5] = starts[6] - 4
    expected = [(number, json.loads(line)) for number, line in zip(numbers, written, strict=True)]
    assert read(whole(path)) == expected
    for cut in range(1, size):
        first, second = Span(path, 0, cut, size), Span(path, cut, size, size)
        assert read(first) == [row for row, start in zip(expected, starts, strict=True) if start < cut]
        assert read(second) == [row for row, start in zip(expected, starts, strict=True) if start >= cut]
    draw = random.Random(1)
    for _ in range(50):
        edges = [0, *sorted(draw.sample(range(1, size), 5)), size]
        spans = [Span(path, start, stop, size) for start, stop in pairwise(edges)]
        assert [row for span in spans for row in read(span)] == expected


def test_a_packed_file_belongs_to_the_span_that_it_begins_in(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 9))
    size = path.stat().st_size
    assert len(read(Span(path, 0, 5, size))) == 9
    assert read(Span(path, 5, size, size)) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a}', 'is not JSON (Unterminated string starting at: character 10): \'{"text": "a}\''),
        (b"<html>", "is not JSON (Expecting value: character 1): '<html>'"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        (b'{"text": "caf\xe9"}', 'is not UTF-8: byte 0xE9 after \'{"text": "caf\'; convert the file to UTF-8'),
        (b'{"text": "\x00"}', "is not JSON (Invalid control character at: character 11)"),
        (b"\x00" * 9, "is not JSON (Expecting value: character 1)"),
        (b"7" * 5000, "is not JSON (Exceeds the limit (4300 digits) for integer string conversion"),
        (b"x" * 10_000, f"is not JSON (Expecting value: character 1): '{'x' * 60}…'"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, suffix: str, line: bytes, message: str) -> None:
    found = bad(tmp_path / f"c{suffix}", b'{"text": "good"}\n\n' + line + b'\n{"text": "caf\xc3\xa9"}\n')
    assert found.startswith(f"c{suffix}, line 3 {message}"), found
    assert read(whole(tmp_path / f"c{suffix}"))[-1] == (4, {"text": "caf\u00e9"})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl.gz", PACKERS[".jsonl.gz"](b'{"text": "a"}\n' * 1000)[:-10], "is truncated or no gzip file"),
        ("c.jsonl.gz", b'{"text": "a"}\n', "is truncated or no gzip file: Not a gzipped file"),
        ("c.jsonl.zst", PACKERS[".jsonl.zst"](b'{"text": "a"}\n' * 1000)[:-10], "is truncated or no zstd file"),
        ("c.jsonl.zst", b'{"text": "a"}\n', "is truncated or no zstd file"),
    ],
    ids=["gz cut", "no gz", "zst cut", "no zst"],  # packed bytes hold the time: no name for pytest's workers to share
)
def test_a_damaged_packed_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read(whole(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / name} {message}")


def test_keys_that_are_there_twice_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": {"b": 1, "b": 2}, "c": 3}\n{"a": 1, "b": 2, "a": 3}\n')
    (_, first), (_, second) = read(whole(tmp_path / "a.jsonl"))
    assert (first, second) == ({"a": {"b": 2}, "c": 3}, {"a": 3, "b": 2})
    assert first["a"].repeated == {"b"} and second.repeated == {"a"} and not hasattr(first, "repeated")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8-sig")
    assert [row for _, row in read(whole(tmp_path / "a.jsonl"))] == [{"text": "one"}, {"text": "two"}]


def test_a_line_without_end_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(lines, "READ_BYTES", 100)
    (tmp_path / "a.jsonl").write_text("7" * 2000)
    with pytest.raises(UserError, match=r"a\.jsonl has a line of more than 1,000 bytes: is it no \.jsonl file\?"):
        read(whole(tmp_path / "a.jsonl"))
