"""Batches for the trainer, and the checks that a dataset fits a model.

Step s takes samples s * global_batch … (s + 1) * global_batch - 1 of the blend, or those that it is told, whatever the
number of ranks: they are dealt to the data-parallel ranks in order, so any dp resumes exactly.

B = micro_batch, T = seq_len, or less where chats are not packed; M = micro-batches of a rank in a step.
With context parallelism each of cp ranks has its own B · T / cp tokens of a micro-batch as one row: B is 1 then.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from llmpipe.data import manifest
from llmpipe.data.indexed import Reader
from llmpipe.data.packing import filled
from llmpipe.data.row import Row, window
from llmpipe.data.sampling import Blend, part_of
from llmpipe.data.tokenizers.beside import hashes
from llmpipe.errors import UserError
from llmpipe.layout import context_slices

TABLES = ("tokens", "labels", "weights", "assistant")
"""What a batch has one of for each token."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank trains on in one step."""

    tokens: torch.Tensor
    """(M, B, T) int64."""
    labels: torch.Tensor
    """(M, B, T) int64: the token after each."""
    weights: torch.Tensor
    """(M, B, T) float32: 0 where the label belongs to another document than the token or is padding, else 1, or in
    chats what the label's role says."""
    assistant: torch.Tensor
    """(M, B, T) bool: where the label is a chat's assistant's."""
    cu_seqlens: torch.Tensor
    """(M, max_docs + 1) int32: where documents start in the B * T tokens of a micro-batch, padded with B * T; of all
    cp ranks' tokens."""
    lengths: tuple[int, ...]
    """(M,) of each micro-batch the T that it needs. What lies beyond is padding, and not in its cu_seqlens."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a rank's device."""
        moved = {name: getattr(self, name).to(device) for name in (*TABLES, "cu_seqlens")}
        return replace(self, **moved)

    def of_context_rank(self, cp: int, rank: int) -> "Batch":
        """The tokens of each micro-batch that one of cp ranks holds."""
        if cp == 1:
            return self

        def own(table: torch.Tensor) -> torch.Tensor:  # (M, B, T) → (M, 1, B * T / cp)
            rows = [row[:, :length].flatten() for row, length in zip(table, self.lengths, strict=True)]
            parts = [torch.cat([row[part] for part in context_slices(len(row), cp, rank)]) for row in rows]
            return pad_sequence(parts, batch_first=True)[:, None]

        lengths = tuple(self.tokens.shape[1] * length // cp for length in self.lengths)
        return replace(self, **{name: own(getattr(self, name)) for name in TABLES}, lengths=lengths)

    def micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each one's tokens, cu_seqlens, labels, weights; all but cu_seqlens (N,) with N = B * T of its own."""
        tables = (self.by_micro_batch(name) for name in ("tokens", "labels", "weights"))
        for cu_seqlens, tokens, labels, weights in zip(self.cu_seqlens, *tables, strict=True):
            yield tokens, cu_seqlens, labels, weights

    def by_micro_batch(self, name: str) -> list[torch.Tensor]:
        """A table's (N,) of each micro-batch."""
        return [rows[:, :length].flatten() for rows, length in zip(getattr(self, name), self.lengths, strict=True)]


class Loader:
    """One rank's batches, by step."""

    def __init__(
        self,
        blend: Blend,
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
        self.blend, self.seq_len, self.micro_batch = blend, seq_len, micro_batch
        self.dp, self.dp_rank = dp, dp_rank
        self.samples_of = samples_of or (lambda step: range(step * global_batch, (step + 1) * global_batch))
        self.cp, self.cp_rank = cp, cp_rank
        self.isolate_documents, self.pad_to = isolate_documents, pad_to or seq_len

    def step(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0."""
        samples = self.samples_of(step)
        each = len(samples) // self.dp
        own = samples[self.dp_rank * each : (self.dp_rank + 1) * each]
        rows = [self._row(found) for found in self.blend.read(np.arange(own.start, own.stop))]
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
    if global_batch % (dp * micro_batch):
        raise UserError(
            f"{key} {global_batch} is not divisible by dp {dp} x micro_batch {micro_batch} = {dp * micro_batch}:"
            f" change {key} in the recipe, or dp or micro_batch in the layout"
        )


def _cu_seqlens(bounds: list[list[int]]) -> torch.Tensor:
    """(M, max_docs + 1): each micro-batch's bounds, its end repeated."""
    longest = max(map(len, bounds))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in bounds], dtype=torch.int32)


def heldout(prefix: Path, split: list[float], part: str, seq_len: int) -> Iterator[NDArray[np.int64]]:
    """The documents of a part in order, in pieces of at most seq_len + 1 tokens that overlap by one.

    Predicting each piece's tokens but its first predicts each token of a document but its first exactly once.
    """
    reader = Reader(prefix)
    for document in part_of(reader, split, part):
        tokens = reader.read(document).astype(np.int64)
        for start in range(0, len(tokens) - 1, seq_len):
            yield tokens[start : start + seq_len + 1]


def check_tokenizer(prefix: Path, tokenizer: Path) -> None:
    """UserError if the dataset was made with another tokenizer than this file; a missing manifest is a warning.

    A tokenizer that lies there in two kinds of files is the same by either.
    """
    facts = manifest.read(prefix)
    if facts is None:
        log.warning("%s has no manifest: whether %s made its tokens cannot be told", prefix, tokenizer)
        return
    made_with, files = facts["tokenizer"], hashes(tokenizer)
    found = files[tokenizer.name]
    if made_with["sha256"] not in files.values() and found not in made_with.get("files", {}).values():
        raise UserError(
            f"{prefix} is a dataset tokenized by another tokenizer than the model's: it was made with"
            f" {made_with['path']} (SHA-256 {made_with['sha256'][:12]}), the model has {tokenizer} ({found[:12]});"
            f" tokenize the corpus again with --tokenizer {tokenizer.parent}"
        )


def check_vocab(prefix: Path, vocab: int) -> None:
    """UserError if the dataset's vocabulary, or without a manifest its largest token, is beyond the model's."""
    facts = manifest.read(prefix)
    if facts is not None:
        needed, what = facts["tokenizer"]["vocab_size"], "its tokenizer has a vocabulary of"
    else:
        smallest, largest = _extremes(Reader(prefix))
        if smallest < 0:
            raise UserError(f"{prefix} is damaged: it holds token {smallest}; tokenize the corpus again")
        needed, what = largest + 1, "its largest token asks for a vocabulary of"
    if needed > vocab:
        raise UserError(
            f"{prefix} does not fit the model: {what} {needed}, the model's embedding has {vocab} rows;"
            " tokenize the corpus with the model's own tokenizer"
        )


def _extremes(reader: Reader) -> tuple[int, int]:
    """The smallest and the largest token of a dataset, read in parts; 0 and -1 where it has none."""
    step = 1 << 24
    parts = [reader.tokens[i : i + step] for i in range(0, len(reader.tokens), step)]
    found = [(int(part.min()), int(part.max())) for part in parts]
    return min((low for low, _ in found), default=0), max((high for _, high in found), default=-1)
