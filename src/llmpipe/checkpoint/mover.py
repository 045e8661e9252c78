"""Moving a model's bytes into new files: window by window, hashed while they are warm, a few files at a time.

No more than a few buffers are in memory, whatever the model's size (design decision 4). A stored tensor whose parts
are blocks of the source's files, of one type, is gathered by the compiled helper; one that is computed or cast is read
through the source, some rows at a time.
"""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from llmpipe import helpers
from llmpipe.checkpoint.blocks import OpenFiles
from llmpipe.checkpoint.layouts import Part, Stored
from llmpipe.checkpoint.source import TensorSource
from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES, EarlyWriteback
from llmpipe.hashing import FileHashes, new_hash
from llmpipe.progress import Progress

_EXPONENT_BITS = {torch.bfloat16: 8, torch.float16: 5, torch.float32: 8, torch.float64: 11}
_THREADS = 4
# Small windows stay in a core's cache until they are hashed and written; large ones read longer rows to transpose.
_WINDOW_BYTES, _TRANSPOSED_BYTES = 1 << 20, CHUNK_BYTES
_ITEM, _FROM_COLUMN, _TO_COLUMN = 3, 6, 9  # of the helper's ten numbers


@dataclass(frozen=True, slots=True)
class Filled:
    """A stored tensor to be written in a type."""

    stored: Stored
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.stored.shape).numel() * self.dtype.itemsize


Segments = list[bytes | Filled]
"""A file from its beginning to its end: headers as they are, tensors to be filled."""


@dataclass(slots=True)
class Mover:
    """Reads a source's tensors as another format stores them; threads may share one."""

    source: TensorSource
    hashed: bool = True
    allow_nonfinite: bool = False
    sources: FileHashes = field(default_factory=FileHashes)
    """The files whose SHA-256 is taken beside that of what is written."""

    def __post_init__(self) -> None:
        self.files = OpenFiles()

    files: OpenFiles = None  # type: ignore[assignment]

    def windows(self, filled: Filled, buffers: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The tensor's bytes in order, each window in the next of the buffers."""
        stored = padded(filled.stored)
        rows, row_bytes = _stored_rows(stored, filled.dtype)
        moves = self._moves(stored, filled.dtype, row_bytes)
        at_once = max(1, _window_bytes(moves) // row_bytes)
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            out = _sized(next(buffers), (last - first) * row_bytes)
            if stored.padding == "zeros":
                out[:] = 0
            if moves is None:
                self._compute(stored, filled.dtype, first, last, out)
            else:
                self._gather(moves, row_bytes, first, last, out)
            if not self.allow_nonfinite:
                self._check_finite(stored, filled.dtype, first, out)
            yield out

    def check_finite(self, files: dict[str, list[Filled]]) -> None:
        """UserError if a tensor holds NaN or infinite values and they are not allowed; nothing is written."""
        ring = _Ring()
        for filled in [] if self.allow_nonfinite else [one for tensors in files.values() for one in tensors]:
            for _ in self.windows(filled, ring):
                pass

    def _moves(self, stored: Stored, dtype: torch.dtype, row_bytes: int) -> np.ndarray | None:
        """The helper's table for a whole stored tensor, ten numbers a move; None if it has to be computed."""
        moves: list[tuple[int, ...]] = []
        for part in stored.parts:
            blocks = self.source.blocks(part.key)
            if blocks is None or self.source.dtype(part.key) != dtype:
                return None
            for block in blocks:
                found = block.move(part.rows, part.cols)
                if found is None:
                    continue
                top, left, rows, cols, offset = found
                at_row = part.at_row + (top - part.rows.start) * part.step
                at_col = part.at_col + left - part.cols.start
                item, source = dtype.itemsize, (block.row_stride, block.col_stride)
                number = self.files.number(block.file)
                if stored.transposed:
                    to = at_col * row_bytes + at_row * item
                    moves.append((number, cols, rows, item, offset, *source[::-1], to, row_bytes, part.step * item))
                else:
                    to = at_row * row_bytes + at_col * item
                    moves.append((number, rows, cols, item, offset, *source, to, part.step * row_bytes, item))
        return np.array(moves, dtype=np.int64).reshape(-1)

    def _gather(self, moves: np.ndarray, row_bytes: int, first: int, last: int, out: np.ndarray) -> None:
        try:
            helpers.gather(moves, self.files.descriptors(), row_bytes, first, last, out)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.source.path} cannot be read ({error}): copy or download it again") from error

    def _compute(self, stored: Stored, dtype: torch.dtype, first: int, last: int, out: np.ndarray) -> None:
        """Rows first..last-1 of a stored tensor through the source's `read`."""
        window = torch.from_numpy(out).view(dtype).view(last - first, -1)
        for part in stored.parts:
            rows, cols = part.rows, part.cols
            if stored.transposed:  # stored rows are our columns
                begin, end = _clip(part.at_col, cols.stop - cols.start, 1, first, last)
                target = window[part.at_col + begin - first : part.at_col + end - first].T  # (our rows, our columns)
                target = target[part.at_row : part.at_row + (rows.stop - rows.start) * part.step : part.step]
                cols = slice(cols.start + begin, cols.start + end)
            else:
                begin, end = _clip(part.at_row, rows.stop - rows.start, part.step, first, last)
                start = part.at_row + begin * part.step - first
                target = window[start : start + (end - begin) * part.step : part.step]
                target = target[:, part.at_col : part.at_col + cols.stop - cols.start]
                rows = slice(rows.start + begin, rows.start + end)
            if begin < end:
                slices = (rows, cols) if len(stored.shape) == 2 else (cols,)
                target.copy_(self.source.read(part.key, slices).view(target.shape))

    def _check_finite(self, stored: Stored, dtype: torch.dtype, first: int, out: np.ndarray) -> None:
        at = helpers.first_nonfinite(out, dtype.itemsize, _EXPONENT_BITS[dtype])
        if at >= 0:
            raise UserError(
                f"{self.source.path}: NaN or infinite values: {stored.name}, which is made of"
                f" {', '.join(sorted({part.key for part in stored.parts}))}, first in row"
                f" {first + at * dtype.itemsize // _stored_rows(stored, dtype)[1]}: get the weights again,"
                f" or allow them with --allow-nonfinite{self._too_narrow(stored, dtype)}"
            )

    def _too_narrow(self, stored: Stored, dtype: torch.dtype) -> str:
        """A cast makes large values infinite, too."""
        wider = [
            part.key for part in stored.parts if torch.finfo(self.source.dtype(part.key)).max > torch.finfo(dtype).max
        ]
        name = str(dtype).removeprefix("torch.")
        return f"; or leave out --dtype: {name} holds up to {torch.finfo(dtype).max:g}" if wider else ""

    def write(self, path: Path, segments: Segments, shown: Progress | None = None, beside: bool = True) -> str | None:
        """Write a file; returns its SHA-256, None if the mover takes none. It is not atomic by itself.

        `beside`: hash in a thread of its own, where cores would be idle.
        """
        digest, ring, end = new_hash(), _Ring(), 0
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
            writeback = EarlyWriteback(file.fileno())
            for segment in segments:
                chunks = (
                    [np.frombuffer(segment, np.uint8)] if isinstance(segment, bytes) else self.windows(segment, ring)
                )
                for chunk in chunks:
                    if self.hashed and beside:
                        ring.in_use(hasher.submit(self.sources.beside, digest, chunk))
                    elif self.hashed:
                        self.sources.beside(digest, chunk)
                    _write_all(file.fileno(), chunk)
                    end += len(chunk)
                    writeback.reached(end)
                    if shown:
                        shown.add(len(chunk), path.name)
        return digest.hexdigest() if self.hashed else None

    def fill(self, path: Path, tensors: dict[int, Filled], shown: Progress | None = None) -> dict[int, int]:
        """Fill the holes of a file that is there already, tensors by byte offset; returns the CRC-32 of each."""
        crcs, ring, descriptor = dict.fromkeys(tensors, 0), _Ring(), os.open(path, os.O_WRONLY)
        writeback = EarlyWriteback(descriptor)
        try:
            for start, filled in tensors.items():
                at = start
                for chunk in self.windows(filled, ring):
                    crcs[start] = zlib.crc32(chunk.data, crcs[start])
                    _write_all(descriptor, chunk, at)
                    at += len(chunk)
                    writeback.reached(at)
                    if shown:
                        shown.add(len(chunk), path.name)
        finally:
            os.close(descriptor)
        return crcs


def write_files(mover: Mover, files: dict[Path, Segments], shown: Progress | None = None) -> dict[str, str | None]:
    """Write files, dealt to threads; returns their SHA-256 by name."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(min(_THREADS, cores, len(files))) as pool:
        written = {
            path.name: pool.submit(mover.write, path, segments, shown, len(files) < cores)
            for path, segments in files.items()
        }
        try:
            return {name: done.result() for name, done in written.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _window_bytes(moves: np.ndarray | None) -> int:
    """How much of a tensor to move at once."""
    if moves is None:
        return CHUNK_BYTES
    table = moves.reshape(-1, 10)
    transposed = (table[:, _FROM_COLUMN] != table[:, _ITEM]) | (table[:, _TO_COLUMN] != table[:, _ITEM])
    return _TRANSPOSED_BYTES if transposed.any() else _WINDOW_BYTES


def padded(stored: Stored) -> Stored:
    """The same tensor with its padding rows as parts of their own, if they are copies of the last true row."""
    if stored.padding != "last":
        return stored
    last = stored.parts[-1]
    end = last.at_row + last.rows.stop - last.rows.start
    copies = [
        Part(last.key, slice(last.rows.stop - 1, last.rows.stop), last.cols, row) for row in range(end, stored.shape[0])
    ]
    return replace(stored, parts=(*stored.parts, *copies))


class _Ring:
    """A few buffers in turn, none handed out while its bytes are being hashed."""

    def __init__(self) -> None:
        self.buffers = [np.empty(0, np.uint8) for _ in range(3)]
        self.waiting: list[Future[None] | None] = [None] * 3
        self.turn = -1

    def __iter__(self) -> "_Ring":
        return self

    def __next__(self) -> np.ndarray:
        self.turn = (self.turn + 1) % len(self.buffers)
        if used := self.waiting[self.turn]:
            used.result()
        if not len(self.buffers[self.turn]):
            self.buffers[self.turn] = np.empty(CHUNK_BYTES, np.uint8)
        return self.buffers[self.turn]

    def in_use(self, future: "Future[None]") -> None:
        self.waiting[self.turn] = future


def _stored_rows(stored: Stored, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of the tensor as it lies in the file, and the bytes of one."""
    rows, cols = stored.shape if len(stored.shape) == 2 else (1, stored.shape[0])
    return rows, cols * dtype.itemsize


def _clip(at: int, count: int, step: int, first: int, last: int) -> tuple[int, int]:
    """Which of `count` rows, from stored row `at` on in steps, fall into stored rows first..last-1."""
    begin = max(0, -(-(first - at) // step))
    return begin, max(begin, min(count, -(-(last - at) // step)))


def _sized(buffer: np.ndarray, size: int) -> np.ndarray:
    return buffer[:size] if size <= len(buffer) else np.empty(size, np.uint8)


def _write_all(descriptor: int, chunk: np.ndarray, offset: int | None = None) -> None:
    view = chunk.data
    try:
        while len(view):
            done = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
            offset = None if offset is None else offset + done
            view = view[done:]
    except OSError as error:  # a full disk: which one
        error.filename = error.filename or str(Path(f"/proc/self/fd/{descriptor}").readlink())
        raise
