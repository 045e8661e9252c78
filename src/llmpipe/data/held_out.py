"""Rows of held-out documents for evaluation during training: whole ones, packed by best fit, the same every time.

Each token but a document's first is predicted once. A text longer than seq_len + 1 tokens is cut into pieces that
overlap by one token, so that a later piece's first tokens have little context; `llmpipe evaluate` gives them more.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.indexed import Reader
from llmpipe.data.packing import FILLER, ChatSamples, filled, pack
from llmpipe.data.roles import roles_prefix
from llmpipe.data.row import Row
from llmpipe.data.sampling import part_of


class HeldOut:
    """The rows of the held-out documents of several datasets, `Loader`'s stand-in for a blend."""

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
        self.seq_len, self.rows = seq_len, []
        for prefix, weight in data.items():
            most = round(most_rows * weight / sum(data.values())) or 1 if most_rows else None
            rows = (
                _chats(prefix, split, part, seq_len, seed, scalar_loss_mask, most)
                if roles_prefix(prefix)
                else _texts(prefix, split, part, seq_len, seed, most)
            )
            self.rows += rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64]) -> list[Row]:
        """Several rows; beyond the last one they are empty, and count for nothing."""
        return [self.rows[i] if i < len(self.rows) else self._empty() for i in indices.tolist()]

    def _empty(self) -> Row:
        tokens = np.full(self.seq_len, FILLER, np.int64)
        return Row(tokens, tokens, np.zeros(self.seq_len, np.float32), np.zeros(self.seq_len, np.bool_), [])


def _chats(
    prefix: Path, split: list[float], part: str, seq_len: int, seed: int, scalar_loss_mask: float, most: int | None
) -> list[Row]:
    samples = ChatSamples(prefix, split, part, seq_len, 0, seed, scalar_loss_mask)
    return samples.read(np.arange(min(most or samples.samples_per_epoch, samples.samples_per_epoch)))


def _texts(prefix: Path, split: list[float], part: str, seq_len: int, seed: int, most: int | None) -> list[Row]:
    reader = Reader(prefix)
    documents = np.array(part_of(reader, split, part))
    if most:
        documents = np.random.RandomState([seed]).permutation(documents)
        positions = np.cumsum(np.maximum(reader.lengths[documents].astype(np.int64) - 1, 0))
        documents = documents[: np.searchsorted(positions, most * seq_len) + 1]
    pieces = [piece for document in documents.tolist() for piece in _pieces(reader.read(document), seq_len)]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    rows = pack(lengths, seq_len, seed, epoch=0)[:most]
    return [_row([pieces[number] for number in row], seq_len) for row in rows]


def _pieces(tokens: NDArray[np.integer], seq_len: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(tokens) - 1, seq_len):
        yield tokens[start : start + seq_len + 1].astype(np.int64)


def _row(pieces: list[NDArray[np.int64]], seq_len: int) -> Row:
    """Pieces of documents side by side; the last token of each is a label only."""
    tokens, labels = (np.concatenate([piece[cut] for piece in pieces]) for cut in (slice(-1), slice(1, None)))
    starts = np.cumsum([len(piece) - 1 for piece in pieces])[:-1].tolist()
    weights, assistant = np.ones(len(tokens), np.float32), np.zeros(len(tokens), np.bool_)
    return filled(Row(tokens, labels, weights, assistant, starts), seq_len)
