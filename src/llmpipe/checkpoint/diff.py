"""Two checkpoints of any formats compared tensor by tensor, in our names and layout, a few rows at a time."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.formats import NOTHING, Told, detect, open_source
from llmpipe.checkpoint.source import TensorSource
from llmpipe.families import FAMILIES, Shape
from llmpipe.progress import progress

CHUNK = 1 << 19
"""Elements that are read at a time, of each side."""
PIECE = 1 << 15
"""Elements that are compared at a time: larger temporaries cost more page faults than arithmetic."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """What differs in one tensor."""

    key: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    verdict: str
    """equal: bit for bit; rounds: one side is the other's values, rounded to its type; close: within atol; differs;
    rows: equal as far as both go, a vocabulary is larger; shape: not comparable."""
    unequal: int = 0
    """Elements of other bits; between types, of other values."""
    max_abs: float = 0.0
    """Largest |a - b|; inf where one side alone is not finite."""
    max_rel: float = 0.0
    """Largest |a - b| / max(|a|, |b|)."""
    rows: int | None = None
    """How many rows were compared, where one side has more."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two checkpoints."""

    paths: tuple[str, str]
    tensors: list[TensorDiff]
    only: tuple[list[str], list[str]]
    """Tensors of the first and of the second alone."""
    parameters: dict[str, tuple[Any, Any]]
    """The fields of `Shape` that differ."""

    def counts(self) -> dict[str, int]:
        """How many tensors have each verdict."""
        verdicts = [tensor.verdict for tensor in self.tensors]
        return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}

    def equal(self, allow_dtype: bool = False, weights_only: bool = False) -> bool:
        """Whether the checkpoints are the same; by option in other types, or but for hyper-parameters."""
        accepted = {"equal", "close"} | ({"rounds"} if allow_dtype else set())
        same = weights_only or not self.parameters
        return same and not any(self.only) and self.counts().keys() <= accepted


def diff(a: Path, b: Path, atol: float = 0.0, told: Told = NOTHING) -> Difference:
    """Compare two checkpoints; with `atol`, tensors whose elements differ by no more are close."""
    first, second = open_told(a, told), open_told(b, told)
    ours, theirs = first.keys(), second.keys()
    common = [key for key in ours if key in set(theirs)]
    total = sum(math.prod(_shape(first, key)) for key in common)
    with progress("compare", total, "elements") as shown:
        tensors = []
        for key in common:
            tensors.append(compare(first, second, key, atol))
            shown.add(math.prod(_shape(first, key)), key)
    only = ([key for key in ours if key not in set(common)], [key for key in theirs if key not in set(common)])
    return Difference((str(a), str(b)), tensors, only, parameters(first.shape, second.shape))


def open_told(path: Path, told: Told) -> TensorSource:
    """A source; what is told of Megatron directories is of these alone."""
    return open_source(path, told if detect(path) == "megatron" else Told(told.shape))


def parameters(a: Shape, b: Shape) -> dict[str, tuple[Any, Any]]:
    """The hyper-parameters that differ."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in Shape.__dataclass_fields__}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def compare(a: TensorSource, b: TensorSource, key: str, atol: float = 0.0) -> TensorDiff:
    """One tensor of both; of vocabularies of different sizes, the rows that both have."""
    shapes = _shape(a, key), _shape(b, key)
    dtypes = tuple(str(side.dtype(key)).removeprefix("torch.") for side in (a, b))
    rows = _common_rows(a, key, shapes)
    found = TensorDiff(key, (dtypes[0], dtypes[1]), shapes, "shape")
    if rows is None:
        return found
    tally = Tally(same_dtype=dtypes[0] == dtypes[1])
    step = max(1, CHUNK // math.prod(shapes[0][1:]))
    for row in range(0, rows, step):
        part = (slice(row, min(row + step, rows)), *(slice(0, size) for size in shapes[0][1:]))
        tally.add(a.read(key, part), b.read(key, part))
    verdict = tally.verdict(atol)
    if shapes[0] != shapes[1]:
        verdict = "rows" if verdict == "equal" else "differs"
    return replace(
        found, verdict=verdict, unequal=tally.unequal, max_abs=tally.max_abs, max_rel=tally.max_rel,
        rows=None if shapes[0] == shapes[1] else rows,
    )  # fmt: skip


def _shape(source: TensorSource, key: str) -> tuple[int, ...]:
    return FAMILIES[source.shape.family].keys(source.shape)[key].shape(source.shape)


def _common_rows(a: TensorSource, key: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> int | None:
    """How many rows are compared; None if the shapes differ in more than the vocabulary."""
    dims = FAMILIES[a.shape.family].keys(a.shape)[key].dims
    comparable = shapes[0] == shapes[1] or (dims[0] == "vocab" and shapes[0][1:] == shapes[1][1:])
    return min(shapes[0][0], shapes[1][0]) if comparable else None


class Tally:
    """What was found in the parts of a tensor so far."""

    def __init__(self, same_dtype: bool):
        self.same_dtype, self.unequal, self.max_abs, self.max_rel = same_dtype, 0, 0.0, 0.0
        self.a_rounds = self.b_rounds = True

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count two parts of the same shape."""
        for left, right in zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True):
            self._add(left, right)

    def _add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if not self.same_dtype:
            self.a_rounds = self.a_rounds and not _other_bits(a.to(b.dtype), b).any()
            self.b_rounds = self.b_rounds and not _other_bits(b.to(a.dtype), a).any()
        other = _other_bits(a, b) if self.same_dtype else _other_values(a, b)
        count = int(other.count_nonzero())
        if count:
            delta, relative = _largest(a.double(), b.double())
            self.unequal += count
            self.max_abs, self.max_rel = max(self.max_abs, delta), max(self.max_rel, relative)

    def verdict(self, atol: float) -> str:
        """As in `TensorDiff`."""
        if self.same_dtype and not self.unequal:
            return "equal"
        if not self.same_dtype and (self.a_rounds or self.b_rounds):
            return "rounds"
        return "close" if atol > 0 and self.max_abs <= atol else "differs"


def _other_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one type have other bits: NaN equals itself, 0.0 is not -0.0."""
    bits = _BITS[a.dtype.itemsize]
    return a.view(bits) != b.view(bits)


def _other_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(a.dtype, b.dtype)
    return (a.to(wide) != b.to(wide)) & ~(a.isnan() & b.isnan())


def _largest(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The largest absolute and relative difference of fp64; inf if one side alone is not finite somewhere."""
    delta, scale = (a - b).abs_(), torch.maximum(a.abs(), b.abs())
    if not math.isfinite(float(delta.max())):
        same = (a == b) | (a.isnan() & b.isnan())
        delta = delta.masked_fill_(same, 0.0).nan_to_num_(nan=math.inf, posinf=math.inf)
        scale = scale.nan_to_num_(nan=1.0, posinf=1.0)
    relative = delta / scale.clamp_(min=sys.float_info.min)  # two zeros: 0
    return float(delta.max()), float(relative.max())


_HEAD = ("tensor", "dtype", "shape", "unequal", "max|Δ|", "max rel", "")
_RIGHT = range(3, 6)
"""The columns of numbers."""


def table(found: Difference, changed: bool = False) -> list[str]:
    """What differs, in lines; `changed` leaves out the tensors that are equal."""
    rows = [_cells(tensor) for tensor in found.tensors if not (changed and tensor.verdict == "equal")]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    lines = [_line(row, widths) for row in (_HEAD, *rows)] if rows else []
    for side, keys in zip("AB", found.only, strict=True):
        lines += [f"only in {side}: {key}" for key in keys]
    lines += [f"{name}: {a!r} in A, {b!r} in B" for name, (a, b) in found.parameters.items()]
    return [f"A  {found.paths[0]}", f"B  {found.paths[1]}", *lines]


def summary(found: Difference) -> str:
    """The last line."""
    counts = ", ".join(f"{count} {_WORDS[verdict]}" for verdict, count in found.counts().items())
    more = [f"{len(keys)} only in {side}" for side, keys in zip("AB", found.only, strict=True) if keys]
    if found.parameters:
        more.append(f"{len(found.parameters)} hyper-parameters differ")
    return f"{len(found.tensors)} tensors compared: {', '.join([counts, *more])}"


_WORDS = {
    "equal": "bit-equal",
    "rounds": "equal in the narrower type",
    "close": "close",
    "differs": "different",
    "rows": "bit-equal in the common rows",
    "shape": "of other shapes",
}


def _cells(tensor: TensorDiff) -> tuple[str, ...]:
    verdict = _WORDS[tensor.verdict] + (f", first {tensor.rows:,} rows" if tensor.rows else "")
    measured = tensor.verdict != "shape"
    return (
        tensor.key,
        "/".join(dict.fromkeys(tensor.dtypes)),
        "/".join(dict.fromkeys("x".join(map(str, shape)) for shape in tensor.shapes)),
        f"{tensor.unequal:,}" if measured else "",
        f"{tensor.max_abs:.3g}" if measured else "",
        f"{tensor.max_rel:.3g}" if measured else "",
        verdict,
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    placed = [
        cell.rjust(width) if column in _RIGHT else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(placed).rstrip()
