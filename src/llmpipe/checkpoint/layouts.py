"""Layouts: which rows and columns of our tensors lie where in a format's tensors; readers and writers share them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llmpipe.checkpoint.blocks import Block, as_rectangle, matrix
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.source import Slices, sizes_of
from llmpipe.families import Shape, Tensor
from llmpipe.families.family import Family, layer_of


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of one of our tensors that lies, its rows evenly spaced, in a stored tensor.

    A vector is a matrix of one row: rows is slice(0, 1), cols its elements.
    """

    key: str
    rows: slice
    cols: slice
    at_row: int = 0
    """The stored row of the first."""
    step: int = 1
    """Stored rows from one of ours to the next; 2 in interleaved rotary order."""
    at_col: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a format stores it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    """Stored as (in, out); the parts say rows and columns as if it were (out, in)."""
    padding: Literal["last", "zeros"] | None = None
    """What rows beyond the parts hold: copies of the last true row, or zeros (Megatron's padded vocabulary)."""

    @property
    def rows_and_cols(self) -> tuple[int, int]:
        """Of the tensor as (out, in); a vector has one row."""
        sizes = self.shape if len(self.shape) == 2 else (1, *self.shape)
        return (sizes[1], sizes[0]) if self.transposed else (sizes[0], sizes[1])


def piece(name: str, key: str, slices: Slices) -> Stored:
    """A stored tensor that is a slice of one of ours."""
    return Stored(name, sizes_of(slices), (Part(key, *as_rectangle(slices)),))


def whole(name: str, key: str, row: Tensor, shape: Shape) -> Stored:
    """A stored tensor that is one of ours."""
    return piece(name, key, tuple(slice(0, size) for size in row.shape(shape)))


def head_rows(
    key: str, heads: range, head_dim: int, width: int, at_row: int, interleaved: bool = False
) -> Iterable[Part]:
    """The rows of some heads of q, k or v, one head after the other from `at_row` on; `width` columns.

    interleaved: row i of the first half, then row i of the second (Meta), instead of half after half (Hugging Face).
    """
    if not interleaved:
        yield Part(key, slice(heads.start * head_dim, heads.stop * head_dim), slice(0, width), at_row)
        return
    half = head_dim // 2
    for number, head in enumerate(heads):
        for which in (0, 1):
            first = head * head_dim + which * half
            yield Part(key, slice(first, first + half), slice(0, width), at_row + number * head_dim + which, 2)


def clip_rows(parts: Iterable[Part], start: int, stop: int) -> tuple[Part, ...]:
    """The parts within stored rows start..stop-1, their places counted from `start`: a piece of a stored tensor."""
    found = []
    for part in parts:
        count = part.rows.stop - part.rows.start
        begin = max(0, -(-(start - part.at_row) // part.step))
        end = min(count, -(-(stop - part.at_row) // part.step))
        if begin < end:
            rows = slice(part.rows.start + begin, part.rows.start + end)
            found.append(replace(part, rows=rows, at_row=part.at_row + begin * part.step - start))
    return tuple(found)


def grouped_qkv(
    keys: tuple[str, str, str], shape: Shape, kv_heads: range, width: int, interleaved: bool = False
) -> tuple[Part, ...]:
    """q, k and v fused, KV head by KV head: its query heads, then K, then V; `kv_heads` are those of this rank."""
    q, k, v = keys
    each, dim = shape.num_heads // shape.num_kv_heads, shape.head_dim
    parts: list[Part] = []
    for number, head in enumerate(kv_heads):
        start = number * (each + 2) * dim
        own = range(head, head + 1)
        parts += head_rows(q, range(head * each, (head + 1) * each), dim, width, start, interleaved)
        parts += head_rows(k, own, dim, width, start + each * dim, interleaved)
        parts += head_rows(v, own, dim, width, start + (each + 1) * dim)
    return tuple(parts)


def hf_layout(family: Family, shape: Shape) -> list[Stored]:
    """The tensors of a Hugging Face checkpoint, in the flow's order."""
    found: dict[str, Stored] = {}
    for key, row in family.keys(shape).items():
        name = row.hf.format(layer_of(key))
        if row.fused is None:
            found[name] = whole(name, key, row, shape)
        elif name not in found:
            q, k, v = (key.replace(f".{row.fused}.", f".{part}.") for part in "qkv")
            parts = grouped_qkv((q, k, v), shape, range(shape.num_kv_heads), shape.hidden)
            rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
            found[name] = Stored(name, (rows, shape.hidden), parts)
    return list(found.values())


def blocks_of(stored: Stored, tensor: StoredTensor) -> list[tuple[str, Block]]:
    """Where the parts of a stored tensor lie in its file, by our keys."""
    _, _, row_stride, col_stride = matrix(tensor)
    if stored.transposed:
        row_stride, col_stride = col_stride, row_stride
    return [
        (part.key, Block(
            part.rows.start, part.cols.start, part.rows.stop - part.rows.start, part.cols.stop - part.cols.start,
            tensor.file, stored.name, tensor.offset + part.at_row * row_stride + part.at_col * col_stride,
            part.step * row_stride, col_stride,
        ))
        for part in stored.parts
    ]  # fmt: skip
