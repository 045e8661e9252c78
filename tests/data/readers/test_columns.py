"""Parquet and Arrow files as pyarrow and `datasets` write them: rows, spans, projection, damage."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet

from llmpipe.data.readers import table
from llmpipe.data.readers.block import BadRow, Span, whole
from llmpipe.errors import UserError

ROWS: list[dict[str, Any]] = [
    {
        "id": i,
        "text": f"caf\u00e9 {i} " * (i % 7),
        "meta": {"title": None if i % 5 == 0 else str(i)},
        "ids": [i] * (i % 3),
    }
    for i in range(100)
]


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=17)


def write_stream(path: Path) -> None:
    made = pyarrow.Table.from_pylist(ROWS)
    with ipc.new_stream(path, made.schema) as writer:
        writer.write_table(made, max_chunksize=17)


def write_file(path: Path) -> None:
    made = pyarrow.Table.from_pylist(ROWS)
    with ipc.new_file(path, made.schema, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(made, max_chunksize=17)


WRITERS = {"a.parquet": write_parquet, "stream.arrow": write_stream, "file.arrow": write_file}


def read(span: Span, keys: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> list[tuple[int, Any]]:
    blocks = table.parquet_blocks if span.path.suffix == ".parquet" else table.arrow_blocks
    return [found for block in blocks(span, keys, optional) for found in block.rows()]


@pytest.fixture(params=WRITERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    WRITERS[request.param](tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("block_bytes", [1 << 20, 300, 1])
def test_all_rows_in_order(path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BLOCK_BYTES", block_bytes)
    assert read(whole(path)) == list(enumerate(ROWS, start=1))


def test_wanted_columns_alone(path: Path) -> None:
    found = [row for _, row in read(whole(path), ("meta.title",), ("labels", "ids"))]
    assert found == [{"meta": row["meta"], "ids": row["ids"]} for row in ROWS]


def test_spans_share_no_row_and_lose_none(path: Path) -> None:
    size = path.stat().st_size
    for cut in (1, 100, size // 3, size // 2, size - 1):
        first, second = read(Span(path, 0, cut, size)), read(Span(path, cut, size, size))
        assert first + second == list(enumerate(ROWS, start=1))
        assert abs(len(first) - 100 * cut / size) <= 1


def test_a_missing_column_is_named(path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(whole(path), ("txt",))
    assert (
        str(error.value)
        == f"{path} has no column 'txt', its columns are 'id', 'text', 'meta', 'ids'; did you mean 'text'?"
    )


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[:90], lambda _: b"", lambda _: b"{}\n" * 9]
)
def test_a_damaged_file_is_named(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path.name} is damaged or no (Parquet|Arrow) file: "):
        read(whole(path))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has 2 columns 'text', its columns are 'text', 'text'"):
        read(whole(tmp_path / "a.parquet"), ("text",))


def test_a_flipped_page_is_told_or_gives_rows(tmp_path: Path) -> None:
    """Whatever is flipped, a UserError comes out, or rows."""
    write_parquet(tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    for at in range(4, len(good), 41):
        (tmp_path / "a.parquet").write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            assert len(read(whole(tmp_path / "a.parquet"), ("text",))) <= 100
        except UserError as error:
            assert "a.parquet" in str(error)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    texts = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (_, first), (number, second), (_, third) = read(whole(tmp_path / "a.parquet"))
    assert (first, third) == ({"text": "one"}, {"text": "two"})
    assert isinstance(second, BadRow) and (number, str(second)) == (2, "is not UTF-8: byte 0xE9")


def test_what_datasets_saves(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "d", num_shards=1)
    found = read(whole(tmp_path / "d" / "data-00000-of-00001.arrow"))
    assert [row for _, row in found] == datasets.load_from_disk(tmp_path / "d").to_list() == ROWS


def test_a_row_group_is_not_held(tmp_path: Path) -> None:
    """One row group of 24 MB takes less than 12 MB of Python's and pyarrow's memory."""
    rows = [json.dumps({"n": i}) + "x" * 8000 for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", use_dictionary=False, compression="none")
    del rows
    tracemalloc.start()
    before, peak = pyarrow.total_allocated_bytes(), 0
    for block in table.parquet_blocks(whole(tmp_path / "a.parquet"), ("text",), ()):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
        assert block.read
    assert tracemalloc.get_traced_memory()[1] + peak < 12 << 20
    tracemalloc.stop()
