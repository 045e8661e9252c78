"""Where the elements of our tensors lie in files: rectangles with strides, and reading through them.

A vector is a matrix of one row.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmpipe import helpers
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.source import Slices, resolved, sizes_of
from llmpipe.errors import UserError
from llmpipe.families import Shape, Tensor, layer_of
from llmpipe.files import CHUNK_BYTES

# Of each file, to tell it from its neighbours: how many places, how much at each; fewer different bytes say nothing.
_SAMPLES, _SAMPLE_BYTES, _CONSTANT = 8, 4096, 5


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of one of our tensors, and where its elements lie in a file."""

    row: int
    col: int
    rows: int
    cols: int
    file: Path
    name: str
    """The stored tensor's, for messages."""
    offset: int
    """Of element (row, col), in bytes."""
    row_stride: int
    col_stride: int
    """In bytes."""

    def move(self, rows: slice, cols: slice) -> tuple[int, int, int, int, int] | None:
        """What it holds of a rectangle of ours: first row and column, rows, columns, byte offset; None for nothing."""
        top, bottom = max(self.row, rows.start), min(self.row + self.rows, rows.stop)
        left, right = max(self.col, cols.start), min(self.col + self.cols, cols.stop)
        if top >= bottom or left >= right:
            return None
        offset = self.offset + (top - self.row) * self.row_stride + (left - self.col) * self.col_stride
        return top, left, bottom - top, right - left, offset


def straight(tensor: StoredTensor, name: str) -> Block:
    """The block of a stored tensor that is one of ours as it is."""
    rows, cols, row_stride, col_stride = matrix(tensor)
    return Block(0, 0, rows, cols, tensor.file, name, tensor.offset, row_stride, col_stride)


def matrix(tensor: StoredTensor) -> tuple[int, int, int, int]:
    """Rows, columns and their strides in bytes; a vector has one row."""
    item = tensor.dtype.itemsize
    if len(tensor.shape) == 1:
        return 1, tensor.shape[0], tensor.shape[0] * item, tensor.strides[0] * item
    (rows, cols), (row_stride, col_stride) = tensor.shape, tensor.strides
    return rows, cols, row_stride * item, col_stride * item


def as_rectangle(slices: Slices) -> tuple[slice, slice]:
    """Slices of a matrix or a vector as rows and columns."""
    return (slices[0], slices[1]) if len(slices) == 2 else (slice(0, 1), slices[0])


class OpenFiles:
    """Descriptors of source files, opened once and shared by threads."""

    def __init__(self) -> None:
        self._numbers: dict[Path, int] = {}
        self._descriptors: list[int] = []
        self._lock = threading.Lock()

    def number(self, path: Path) -> int:
        """The place of a file in `descriptors`."""
        with self._lock:
            if path not in self._numbers:
                self._descriptors.append(os.open(path, os.O_RDONLY))
                self._numbers[path] = len(self._descriptors) - 1
            return self._numbers[path]

    def descriptors(self) -> np.ndarray:
        """(files,) int64."""
        return np.array(self._descriptors, dtype=np.int64)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone already
        for descriptor in self._descriptors:
            close(descriptor)


class FileSource:
    """A `TensorSource` whose tensors are blocks of files; readers of formats fill `blocks_by_key` and `dtypes`."""

    path: Path
    shape: Shape
    tokenizer_place: Path

    def __init__(self, path: Path, shape: Shape, table: dict[str, Tensor]):
        self.path, self.shape, self.table = path, shape, table
        self.tokenizer_place = path
        self.blocks_by_key: dict[str, list[Block]] = {key: [] for key in table}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files = OpenFiles()

    def keys(self) -> list[str]:
        return list(self.table)

    def dtype(self, key: str) -> torch.dtype:
        return self.dtypes[key]

    def blocks(self, key: str) -> list[Block] | None:
        return self.blocks_by_key[key]

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        wanted = resolved(slices, self.table[key].shape(self.shape))
        whole = torch.empty(sizes_of(wanted), dtype=self.dtypes[key])
        gather_into(whole, self.blocks_by_key[key], *as_rectangle(wanted), self._files)
        return whole

    def add(self, key: str, block: Block, dtype: torch.dtype) -> None:
        """Add a block; UserError if those before it are of another type."""
        if (first := self.dtypes.setdefault(key, dtype)) != dtype:
            raise UserError(
                f"{block.file}: {block.name} is {dtype}, elsewhere {first}: copy or download all files again"
            )
        self.blocks_by_key[key].append(block)

    def check_different(self) -> None:
        """UserError if two files hold the same bytes: one was copied over the other, or was written twice."""
        seen: dict[tuple[bytes, ...], Path] = {}
        for file, places in self._largest_blocks().items():
            with file.open("rb") as opened:
                read = tuple(os.pread(opened.fileno(), _SAMPLE_BYTES, place) for place in places)
            if all(len(set(piece)) < _CONSTANT for piece in read):  # zeros or ones, which may well be the same
                continue
            if (first := seen.setdefault(read, file)) != file:
                raise UserError(
                    f"{file} holds the same bytes as {first}, which is another rank's: one file is there twice, and"
                    " another is missing: copy or download all again"
                )

    def _largest_blocks(self) -> dict[Path, list[int]]:
        """The offsets of a few large blocks of each file."""
        blocks = sorted(
            (-block.rows * block.cols, str(block.file), block.offset, block.file)
            for key in self.blocks_by_key
            for block in self.blocks_by_key[key]
            if layer_of(key) is not None  # the last rank may have fewer rows of the vocabulary
        )
        found: dict[Path, list[int]] = {}
        for _, _, offset, file in blocks:
            if len(places := found.setdefault(file, [])) < _SAMPLES:
                places.append(offset)
        return found

    def check_covered(self) -> None:
        """UserError unless each tensor's blocks cover it exactly; overlaps show as too many elements."""
        for key, row in self.table.items():
            size = torch.Size(row.shape(self.shape)).numel()
            held = sum(block.rows * block.cols for block in self.blocks_by_key[key])
            if held != size:
                raise UserError(f"{self.path}: {key} has {size} elements, but the files hold {held} of them")


def gather_into(target: torch.Tensor, blocks: list[Block], rows: slice, cols: slice, files: OpenFiles) -> None:
    """Fill a tensor, (rows, columns) of one of ours, from its blocks."""
    item, width = target.dtype.itemsize, cols.stop - cols.start
    if target.numel() == 0:
        return
    moves = [
        (files.number(block.file), count, columns, item, offset, block.row_stride, block.col_stride,
         ((top - rows.start) * width + left - cols.start) * item, width * item, item)
        for block in blocks
        if (found := block.move(rows, cols))
        for top, left, count, columns, offset in [found]
    ]  # fmt: skip
    out = target.view(-1).view(torch.uint8).numpy()
    table = np.array(moves, dtype=np.int64).reshape(-1)
    try:
        helpers.gather(table, files.descriptors(), width * item, 0, rows.stop - rows.start, out)
    except (OSError, RuntimeError) as error:
        names = ", ".join(sorted({str(block.file) for block in blocks}))
        raise UserError(f"{names} cannot be read ({error}): copy or download it again") from error


def same_bytes(one: StoredTensor, other: StoredTensor | None) -> bool:
    """Whether two stored tensors are equal bit for bit, compared some rows at a time."""
    if other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if (one.file, one.offset, one.strides) == (other.file, other.offset, other.strides):
        return True
    if len(one.shape) not in (1, 2):
        return False  # no tensor of a model: refused where the shapes are checked
    files, (rows, cols, _, _) = OpenFiles(), matrix(one)
    at_once = max(1, CHUNK_BYTES // max(1, cols * one.dtype.itemsize))
    for first in range(0, rows, at_once):
        part = slice(first, min(first + at_once, rows))
        both = [torch.empty(part.stop - first, cols, dtype=one.dtype) for _ in range(2)]
        for target, tensor in zip(both, (one, other), strict=True):
            gather_into(target, [straight(tensor, "")], part, slice(0, cols), files)
        if not torch.equal(*(target.view(torch.uint8) for target in both)):
            return False
    return True
