"""Parquet and Arrow files through pyarrow, the wanted columns alone, a few rows at a time.

A row begins at its share of the file's bytes: of n rows, row i at i / n, so that files are cut without reading them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe.data.readers.block import BLOCK_BYTES, BadRow, Block, Span, listed
from llmpipe.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow

MAX_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Rows(Block):
    """Some rows as an IPC stream, which holds no more than these rows when it travels."""

    content: bytes

    def rows(self) -> Iterator[tuple[int, Any]]:
        import pyarrow

        batch = pyarrow.ipc.open_stream(self.content).read_next_batch()
        try:
            yield from enumerate(batch.to_pylist(), start=self.first)
        except UnicodeDecodeError:
            for i in range(len(batch)):
                yield self.first + i, _row(batch.slice(i, 1))


def _row(batch: "pyarrow.RecordBatch") -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8: byte 0x{error.object[error.start]:02X}")


def parquet_blocks(span: Span, keys: Sequence[str], optional: Sequence[str]) -> Iterator[Block]:
    """The rows of a Parquet file, streamed within its row groups."""
    from pyarrow import parquet

    with (
        _damage_told(span.path, "Parquet"),
        parquet.ParquetFile(span.path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file,
    ):
        columns = _columns(span.path, file.schema_arrow.names, keys, optional)
        yield from _blocks(span, file.metadata.num_rows, _parquet_batches(file, span, columns))


def _parquet_batches(file: Any, span: Span, columns: list[str]) -> Iterator[tuple[int, "pyarrow.RecordBatch"]]:
    first, last = _range(span, file.metadata.num_rows)
    start = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        if start < last and start + group.num_rows > first:
            rows = max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            at = start
            for batch in file.iter_batches(rows, [number], columns, use_threads=False):
                yield at, batch
                at += len(batch)
        start += group.num_rows


def arrow_blocks(span: Span, keys: Sequence[str], optional: Sequence[str]) -> Iterator[Block]:
    """The rows of an Arrow file, of streams (as `datasets` writes them) and of files (Feather) alike; it is mapped."""
    import pyarrow

    with _damage_told(span.path, "Arrow"), pyarrow.memory_map(str(span.path)) as source:
        names = _arrow_reader(source).schema.names
        columns = _columns(span.path, names, keys, optional)
        num_rows = sum(len(batch) for _, batch in _arrow_batches(source))
        yield from _blocks(span, num_rows, ((at, batch.select(columns)) for at, batch in _arrow_batches(source)))


def _arrow_batches(source: Any) -> Iterator[tuple[int, "pyarrow.RecordBatch"]]:
    """Each batch with the number of its first row, from 0; nothing is read of a batch itself."""
    reader, at = _arrow_reader(source), 0
    stream = not hasattr(reader, "num_record_batches")
    for batch in reader if stream else map(reader.get_batch, range(reader.num_record_batches)):
        yield at, batch
        at += len(batch)


def _arrow_reader(source: Any) -> Any:
    """Of a stream, or of a file, which begins with ARROW1."""
    from pyarrow import ipc

    source.seek(0)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return ipc.open_file(source) if is_file else ipc.open_stream(source)


@contextmanager
def _damage_told(path: Path, kind: str) -> Iterator[None]:
    """UserError for what pyarrow cannot read; an error of the disk, which has a number, passes."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"{path} is damaged or no {kind} file: {error}") from error


def _range(span: Span, num_rows: int) -> tuple[int, int]:
    """The rows that begin in a span: from the first up to before the last."""
    return -(-num_rows * span.start // span.size), -(-num_rows * span.stop // span.size)


def _blocks(span: Span, num_rows: int, batches: Iterator[tuple[int, "pyarrow.RecordBatch"]]) -> Iterator[Block]:
    """The rows of a span as blocks of about a megabyte."""
    first, last = _range(span, num_rows)
    for at, batch in batches:
        begin, end = max(first - at, 0), min(last - at, len(batch))
        if begin < end:
            step = max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES * len(batch) // max(batch.nbytes, 1)))
            for row in range(begin, end, step):
                part = batch.slice(row, min(step, end - row))
                read = span.size * len(part) // num_rows
                yield Rows(span.path, at + row + 1, read, _packed(part))


def _packed(batch: "pyarrow.RecordBatch") -> bytes:
    from pyarrow import BufferOutputStream, ipc

    sink = BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _columns(path: Path, names: list[str], keys: Sequence[str], optional: Sequence[str]) -> list[str]:
    """The columns that hold keys; a key may lead into one, as `meta.title` into `meta`. Without keys all of them."""

    def column(key: str) -> str:
        return key if key in names else key.partition(".")[0]

    for key in keys:
        if names.count(column(key)) != 1:
            found = f"{names.count(column(key))} columns" if column(key) in names else "no column"
            raise UserError(f"{path} has {found} {key!r}, its columns are {listed(names)}; {nearest(key, names[:20])}")
    wanted = {column(key) for key in (*keys, *optional)}
    return [name for name in names if name in wanted or not keys]
