"""Batches for the trainer.

Step s takes samples s * global_batch … (s + 1) * global_batch - 1 of the blend, or those that it is told, whatever the
number of ranks: they are dealt to the data-parallel ranks in order, so any dp resumes exactly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llmpipe.data.batches.batch import TABLES, Batch
from llmpipe.data.batches.packing import filled
from llmpipe.data.batches.row import Row, window
from llmpipe.errors import UserError


class RowSource(Protocol):
    """A blend of datasets, or held-out documents."""

    def read(self, indices: NDArray[np.int64]) -> list[Any]:
        """Several samples: each a `Row`, or seq_len + 1 tokens and where documents start in them."""
        ...


class Loader:
    """One rank's batches, by step."""

    def __init__(
        self,
        rows: RowSource,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        dp: int,
        dp_rank: int,
        isolate_documents: bool = True,
        pad_to: int | None = None,
        cp: int = 1,
        cp_rank: int = 0,
        samples_of: Callable[[int], range] | None = None,
    ):
        """The cp ranks of a dp rank have the same sequences, each its own tokens of them.

        `samples_of`: the samples of a step where not all steps take global_batch.

        `pad_to`: rows shorter than seq_len get a multiple of it, as many as the longest of their micro-batch needs.

        None fills them up to seq_len.
        """
        check_batch(global_batch, micro_batch, dp)
        self.rows, self.seq_len, self.micro_batch = rows, seq_len, micro_batch
        self.dp, self.dp_rank = dp, dp_rank
        self.samples_of = samples_of or (lambda step: range(step * global_batch, (step + 1) * global_batch))
        self.cp, self.cp_rank = cp, cp_rank
        self.isolate_documents, self.pad_to = isolate_documents, pad_to or seq_len

    def step(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0."""
        samples = self.samples_of(step)
        check_batch(len(samples), self.micro_batch, self.dp, "batch_ramp")  # the others were checked at the start
        each = len(samples) // self.dp
        own = samples[self.dp_rank * each : (self.dp_rank + 1) * each]
        rows = [self._row(found) for found in self.rows.read(np.arange(own.start, own.stop))]
        groups = [rows[first : first + self.micro_batch] for first in range(0, len(rows), self.micro_batch)]
        lengths = [self._length(group) for group in groups]
        cu_seqlens = _cu_seqlens([self._starts(*pair) for pair in zip(groups, lengths, strict=True)])
        rows = [filled(row, max(lengths)) for row in rows]

        def table(name: str) -> torch.Tensor:  # (M, B, T)
            return torch.from_numpy(np.stack([getattr(row, name) for row in rows])).unflatten(0, (-1, self.micro_batch))

        batch = Batch(*map(table, TABLES), cu_seqlens=cu_seqlens, lengths=tuple(lengths))
        return batch.of_context_rank(self.cp, self.cp_rank)

    def _row(self, found: Row | tuple[NDArray[np.int64], list[int]]) -> Row:
        row = found if isinstance(found, Row) else window(found[0], found[1] if self.isolate_documents else [])
        return row if self.isolate_documents else replace(row, starts=[])

    def _length(self, rows: list[Row]) -> int:
        """The T of a micro-batch."""
        longest = max(map(len, rows))
        return min(self.seq_len, -(-longest // self.pad_to) * self.pad_to)

    def _starts(self, rows: list[Row], length: int) -> list[int]:
        """Where documents start in the B * T tokens of a micro-batch, and their end; every row starts one."""
        rows = [filled(row, length) for row in rows]
        # a document that starts at T is only the last label's
        starts = [r * length + p for r, row in enumerate(rows) for p in (0, *row.starts) if p < length]
        return [*starts, len(rows) * length]


def check_batch(global_batch: int, micro_batch: int, dp: int, key: str = "global_batch") -> None:
    """UserError if a global batch, of this key of the recipe, does not deal out evenly."""
    each = dp * micro_batch
    if global_batch % each:
        multiples = global_batch // each * each, -(-global_batch // each) * each
        would = " or ".join(str(multiple) for multiple in multiples if multiple)
        raise UserError(
            f"{key} {global_batch} is not divisible by dp {dp} x micro_batch {micro_batch} = {each}:"
            f" change {key} in the recipe, to {would} say, or dp or micro_batch in the layout"
        )


def _cu_seqlens(bounds: list[list[int]]) -> torch.Tensor:
    """(M, max_docs + 1): each micro-batch's bounds, its end repeated."""
    longest = max(map(len, bounds))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in bounds], dtype=torch.int32)
