"""JSON files: rows of arrays and of objects one after the other, however they are read; json is the oracle."""

import gzip
import json
import random
import string
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llmpipe.data.readers import values
from llmpipe.data.readers.block import BadRow, Span, whole
from llmpipe.errors import UserError

ROWS: list[Any] = [
    {"text": "plain"},
    {"text": 'brackets ]}[{ , and \\" quotes \\', "nested": {"a": [1, {"b": "],"}], "c": []}},
    {},
    [1, [2, {"x": "}"}], "]"],
    "a text, with ] in it",
    7,
    None,
    {"\u00e9\U0001f600": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "n": [1.5, -2, True]},
]


def read(path: Path) -> list[Any]:
    numbered = [found for block in values.blocks(whole(path), (), ()) for found in block.rows()]
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [row for _, row in numbered]


@pytest.mark.parametrize("block_bytes", [1 << 20, 64, 1])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_and_objects_in_a_row(
    tmp_path: Path, block_bytes: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.json"
    for ensure_ascii in (True, False):
        path.write_text(" \n" + json.dumps(ROWS, indent=indent, ensure_ascii=ensure_ascii) + "\n")
        assert read(path) == ROWS
        objects = [row for row in ROWS if isinstance(row, dict)]
        for between in ("", "\n", " \r\n\t"):
            path.write_text(between.join(json.dumps(row, indent=indent, ensure_ascii=ensure_ascii) for row in objects))
            assert read(path) == objects
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert read(path) == ROWS
    path.with_suffix(".json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert read(path.with_suffix(".json.gz")) == ROWS


def test_random_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(7)

    def value(depth: int) -> Any:
        kind = draw.randrange(7 if depth else 4)
        if kind == 6:
            return {str(value(0)): value(depth - 1) for _ in range(draw.randrange(4))}
        if kind >= 4:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        return [
            draw.random(),
            None,
            draw.randrange(10**9),
            "".join(draw.choices('"\\[]{},: \n' + string.printable, k=9)),
        ][kind]

    for number in range(200):
        monkeypatch.setattr(values, "BLOCK_BYTES", draw.randrange(1, 60))
        rows = [value(3) for _ in range(draw.randrange(6))]
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(rows, indent=draw.choice([None, 2])))
        assert read(path) == rows


@pytest.mark.parametrize("text", ["", " \n", "[]", "[ ]\n", "[][]"])
def test_files_without_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": "x', "ends inside row 2: it is truncated, or a bracket or quote is missing"),
        ('[{"a": 1}, {"a": "x\\', "ends inside row 2: it is truncated, or a bracket or quote is missing"),
        ('{"a": 1}{"a": [', "ends inside row 2: it is truncated, or a bracket or quote is missing"),
        ("[" * 1000, "ends inside row 1: it is truncated, or a bracket or quote is missing"),
        ('{"a": 1}, {"a": 2}', "is no JSON of objects: after 1 rows there is ', {\"a\": 2}'"),
        ("<html>", "is no JSON of objects: after 0 rows there is '<html>'"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.json")
    assert str(error.value) == f"{tmp_path / 'a.json'} {message}"


def test_a_bad_row_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    bomb = "[" * 5000 + "]" * 5000
    (tmp_path / "a.json").write_bytes(
        f'[{{"a": 1}}, {{"a" 2}}, {bomb}, "caf\xe9", {{"a": 3}} {{}}, 4]'.encode("latin-1")
    )
    found = [str(row) if isinstance(row, BadRow) else row for row in read(tmp_path / "a.json")]
    assert found[0] == {"a": 1} and found[5] == 4
    assert found[1] == "is not JSON (Expecting ':' delimiter: character 6): '{\"a\" 2}'"
    assert found[2].startswith("is not JSON (maximum recursion depth exceeded")
    assert found[3] == "is not UTF-8: byte 0xE9 after '\"caf'; convert the file to UTF-8"
    assert found[4] == "is not JSON (Extra data: character 10): '{\"a\": 3} {}'"


def test_a_file_belongs_to_the_span_that_it_begins_in(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    assert sum(1 for block in values.blocks(Span(tmp_path / "a.json", 0, 1, 9), (), ()) for _ in block.rows()) == 3
    assert not list(values.blocks(Span(tmp_path / "a.json", 1, 9, 9), (), ()))


def test_an_array_is_not_held(tmp_path: Path) -> None:
    """12 MB in rows of 10 KB take less than 6 MB, with blocks of one."""
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",\n".join([json.dumps({"text": "x" * 10_000})] * 1200) + "]")
    tracemalloc.start()
    assert sum(1 for block in values.blocks(whole(tmp_path / "a.json"), (), ()) for _ in block.rows()) == 1200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
