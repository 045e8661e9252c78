"""Parts of stored tensors: rectangles of a layout's tensor, and where the flat runs of a file's array lie in it."""

from llmpipe.checkpoint.containers.msgpack_file import StoredArray
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.layouts import Part, Stored


def in_pieces(stored: Stored, array: StoredArray) -> list[tuple[Stored, StoredTensor]]:
    """A stored tensor as the rectangles that flax's flat chunks hold of it, each where it lies."""
    width, item, found, start = array.shape[-1], array.dtype.itemsize, [], 0
    for offset, count in array.pieces:
        for rows, cols in _rectangles(start, start + count, width):
            at = offset + (rows.start * width + cols.start - start) * item
            cut = cut_out(stored, rows, cols)
            found.append((cut, StoredTensor(array.file, at, array.dtype, cut.shape, (width, 1)[-len(cut.shape) :])))
        start += count
    return found


def _rectangles(start: int, stop: int, width: int) -> list[tuple[slice, slice]]:
    """Elements start..stop-1 of a row-major matrix as rows and columns: a rest of a row, whole rows, a row's start."""
    (top, left), (bottom, right) = divmod(start, width), divmod(stop, width)
    if top == bottom:
        return [(slice(top, top + 1), slice(left, right))] if left < right else []
    first = [(slice(top, top + 1), slice(left, width))] if left else []
    whole_rows = slice(top + bool(left), bottom)
    middle = [(whole_rows, slice(0, width))] if whole_rows.start < whole_rows.stop else []
    return first + middle + ([(slice(bottom, bottom + 1), slice(0, right))] if right else [])


def cut_out(stored: Stored, rows: slice, cols: slice) -> Stored:
    """Rows and columns of a tensor, as they lie in the file, as a tensor of its own; a vector is one row."""
    shape = (rows.stop - rows.start, cols.stop - cols.start)[-len(stored.shape) :]
    out, inside = (cols, rows) if stored.transposed else (rows, cols)
    parts = (part for whole in stored.parts for part in _clipped(whole, out, inside))
    return Stored(stored.name, shape, tuple(parts), stored.transposed)


def _clipped(part: Part, out: slice, inside: slice) -> list[Part]:
    """What a part has in rows `out` and columns `inside` of its tensor as (out, in), counted from there."""
    count, width = part.rows.stop - part.rows.start, part.cols.stop - part.cols.start
    begin = max(0, -(-(out.start - part.at_row) // part.step))
    end = min(count, -(-(out.stop - part.at_row) // part.step))
    left, right = max(0, inside.start - part.at_col), min(width, inside.stop - part.at_col)
    if begin >= end or left >= right:
        return []
    return [Part(
        part.key, slice(part.rows.start + begin, part.rows.start + end),
        slice(part.cols.start + left, part.cols.start + right),
        part.at_row + begin * part.step - out.start, part.step, part.at_col + left - inside.start,
    )]  # fmt: skip
