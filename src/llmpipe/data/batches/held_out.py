"""Rows of held-out documents for evaluation during training: whole ones, packed by best fit, the same every time.

Each token but a document's first is predicted once. A text longer than seq_len + 1 tokens is cut into pieces that
overlap by one token, so that a later piece's first tokens have little context; `llmpipe evaluate` gives them more.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.batches.packing import FILLER, ChatSamples, filled, pack
from llmpipe.data.batches.row import Row
from llmpipe.data.batches.sampling import part_of
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.dataset.roles import roles_prefix


class HeldOut:
    """The rows of the held-out documents of several datasets, `Loader`'s stand-in for a blend; read when asked for."""

    def __init__(
        self,
        data: dict[Path, float],
        split: list[float],
        part: str,
        seq_len: int,
        most_rows: int,
        seed: int,
        scalar_loss_mask: float = 0.0,
    ):
        """`most_rows` are shared out by the datasets' weights, of documents drawn at random; 0: all there are."""
        self.seq_len = seq_len
        self.rows: list[tuple[ChatSamples | Texts, int]] = []
        for prefix, weight in data.items():
            most = round(most_rows * weight / sum(data.values())) or 1 if most_rows else None
            if roles_prefix(prefix):
                samples = ChatSamples(prefix, split, part, seq_len, 0, seed, scalar_loss_mask)
                count = samples.samples_per_epoch
            else:
                samples = Texts(prefix, split, part, seq_len, seed, most)
                count = len(samples)
            self.rows += [(samples, number) for number in range(min(most or count, count))]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64]) -> list[Row]:
        """Several rows; beyond the last one they are empty, and count for nothing."""
        return [self._row(index) for index in indices.tolist()]

    def _row(self, index: int) -> Row:
        if index < len(self):
            samples, number = self.rows[index]
            return samples[number]
        tokens = np.full(self.seq_len, FILLER, np.int64)
        return Row(tokens, tokens, np.zeros(self.seq_len, np.float32), np.zeros(self.seq_len, np.bool_), [])


class Texts:
    """The packed texts of one part of one dataset; with `most`, of as many documents as fill so many rows."""

    def __init__(self, prefix: Path, split: list[float], part: str, seq_len: int, seed: int, most: int | None):
        self.reader, self.seq_len = Reader(prefix), seq_len
        documents = np.array(part_of(self.reader, split, part))
        if most:
            documents = np.random.RandomState([seed]).permutation(documents)
            positions = np.cumsum(np.maximum(self.reader.lengths[documents].astype(np.int64) - 1, 0))
            documents = documents[: np.searchsorted(positions, most * seq_len) + 1]
        lengths = self.reader.lengths[documents].astype(np.int64)
        counts = np.maximum(-(-(lengths - 1) // seq_len), 0)  # the pieces of each
        offsets = seq_len * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
        self.firsts = np.repeat(self.reader.starts[documents].astype(np.int64), counts) + offsets
        self.lengths = np.minimum(np.repeat(lengths, counts) - offsets, seq_len + 1)
        self.rows = pack(self.lengths, seq_len, seed, epoch=0)[:most]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        """A row: pieces of documents side by side; the last token of each is a label only."""
        pieces = [self._piece(piece) for piece in self.rows[number]]
        tokens, labels = (np.concatenate([piece[cut] for piece in pieces]) for cut in (slice(-1), slice(1, None)))
        starts = np.cumsum([len(piece) - 1 for piece in pieces])[:-1].tolist()
        weights, assistant = np.ones(len(tokens), np.float32), np.zeros(len(tokens), np.bool_)
        return filled(Row(tokens, labels, weights, assistant, starts), self.seq_len)

    def _piece(self, piece: int) -> NDArray[np.int64]:
        first = self.firsts[piece]
        return self.reader.tokens[first : first + self.lengths[piece]].astype(np.int64)


def heldout(prefix: Path, split: list[float], part: str, seq_len: int) -> Iterator[NDArray[np.int64]]:
    """The documents of a part in order, in pieces of at most seq_len + 1 tokens that overlap by one.

    Predicting each piece's tokens but its first predicts each token of a document but its first exactly once.
    """
    reader = Reader(prefix)
    for document in part_of(reader, split, part):
        tokens = reader.read(document).astype(np.int64)
        for start in range(0, len(tokens) - 1, seq_len):
            yield tokens[start : start + seq_len + 1]
