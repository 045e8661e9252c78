"""Batches for the trainer, and the checks that a dataset fits a model.

Step s takes samples s * global_batch … (s + 1) * global_batch - 1 of the blend, whatever the number of ranks: they are
dealt to the data-parallel ranks in order, so any dp resumes exactly.

B = micro_batch, T = seq_len, M = micro-batches of a rank in a step.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llmpipe.data import manifest
from llmpipe.data.indexed import Reader
from llmpipe.data.sampling import Blend, part_of
from llmpipe.errors import UserError
from llmpipe.files import sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank trains on in one step."""

    tokens: torch.Tensor
    """(M, B, T) int64."""
    labels: torch.Tensor
    """(M, B, T) int64: the token after each."""
    weights: torch.Tensor
    """(M, B, T) float32: 0 where the label belongs to another document than the token, else 1."""
    cu_seqlens: torch.Tensor
    """(M, max_docs + 1) int32: where documents start in the B * T tokens of a micro-batch, padded with B * T."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a rank's device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


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
    ):
        check_batch(global_batch, micro_batch, dp)
        self.blend, self.seq_len, self.global_batch, self.micro_batch = blend, seq_len, global_batch, micro_batch
        self.per_rank = global_batch // dp
        self.first = dp_rank * self.per_rank
        self.isolate_documents = isolate_documents

    def step(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0."""
        start = step * self.global_batch + self.first
        rows, boundaries = zip(*(self.blend[i] for i in range(start, start + self.per_rank)), strict=True)
        if not self.isolate_documents:
            boundaries = [[] for _ in rows]
        table = torch.from_numpy(np.stack(rows)).view(-1, self.micro_batch, self.seq_len + 1)  # (M, B, T + 1)
        weights = np.ones((len(rows), self.seq_len), np.float32)
        for row, starts in zip(weights, boundaries, strict=True):
            row[np.array(starts, np.int64) - 1] = 0.0  # the label of a document's last token is another's first
        return Batch(
            tokens=table[..., :-1].contiguous(),
            labels=table[..., 1:].contiguous(),
            weights=torch.from_numpy(weights).view(-1, self.micro_batch, self.seq_len),
            cu_seqlens=_cu_seqlens(list(boundaries), self.micro_batch, self.seq_len),
        )


def check_batch(global_batch: int, micro_batch: int, dp: int) -> None:
    """UserError if a global batch does not deal out evenly."""
    if global_batch % (dp * micro_batch):
        raise UserError(
            f"global_batch {global_batch} is not divisible by dp {dp} x micro_batch {micro_batch}"
            f" = {dp * micro_batch}: change global_batch in the recipe, or dp or micro_batch in the layout"
        )


def _cu_seqlens(boundaries: list[list[int]], micro_batch: int, seq_len: int) -> torch.Tensor:
    """(M, max_docs + 1) from each row's document starts; every row starts a document."""
    starts = []
    for first in range(0, len(boundaries), micro_batch):
        rows = boundaries[first : first + micro_batch]
        # a document that starts at T is only the last label's
        starts.append([r * seq_len + p for r, row in enumerate(rows) for p in (0, *row) if p < seq_len])
    end = micro_batch * seq_len
    table = np.full((len(starts), max(map(len, starts)) + 1), end, np.int32)
    for row, values in zip(table, starts, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(table)


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
    """UserError if the dataset was made with another tokenizer.model than this; a missing manifest is a warning."""
    facts = manifest.read(prefix)
    if facts is None:
        log.warning("%s has no manifest: whether %s made its tokens cannot be told", prefix, tokenizer)
        return
    made_with, found = facts["tokenizer"], sha256(tokenizer)
    if made_with["sha256"] != found:
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
        needed, what = _largest_token(Reader(prefix)) + 1, "its largest token asks for a vocabulary of"
    if needed > vocab:
        raise UserError(
            f"{prefix} does not fit the model: {what} {needed}, the model's embedding has {vocab} rows;"
            " tokenize the corpus with the model's own tokenizer"
        )


def _largest_token(reader: Reader) -> int:
    """The largest token of a dataset, read in parts."""
    step = 1 << 24
    return max((int(reader.tokens[i : i + step].max()) for i in range(0, len(reader.tokens), step)), default=-1)
