"""Chats as rows: each one whole, several in a row of seq_len positions by best fit, or one a row.

A chat of L tokens takes L - 1 positions: its last token is a label only. An epoch has each chat once; which are packed
together, and in which order the rows come, is a pure function of the lengths, seq_len, the seed and the epoch. Every
epoch has as many rows: their number depends on the lengths alone.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.batches.row import Row
from llmpipe.data.batches.sampling import Samples, part_of
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.dataset.roles import ASSISTANT, loss_weights, read_roles, roles_prefix
from llmpipe.errors import UserError

FILLER = 0
"""The token of positions that are left over; their weight is 0."""


def best_fit(sizes: NDArray[np.int64], capacity: int, order: NDArray[np.int64]) -> list[list[int]]:
    """Rows of items of these sizes (1 to `capacity`): the largest first, each where it leaves the least room.

    Items of one size are taken as they come in `order`.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that they have left
    rooms = 0  # bit r is set where there is an open row with room r
    for item in order[np.argsort(-sizes[order], kind="stable")].tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= (not open_rows[room]) << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        open_rows[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def pack(lengths: NDArray[np.int64], seq_len: int, seed: int, epoch: int, packing: bool = True) -> list[list[int]]:
    """The rows of an epoch, as the chats (of these lengths, in tokens) in each; what predicts nothing is in none."""
    random = np.random.RandomState([seed, epoch])  # NumPy promises that its numbers never change
    order = random.permutation(np.flatnonzero(lengths > 1))
    rows = best_fit(lengths - 1, seq_len, order) if packing else [[chat] for chat in order.tolist()]
    return [rows[number] for number in random.permutation(len(rows))]


class ChatSamples:
    """The rows of one part of one dataset with roles, in as many epochs as are asked for."""

    def __init__(
        self,
        prefix: Path,
        split: list[float],
        part: str,
        seq_len: int,
        num_samples: int,
        seed: int,
        scalar_loss_mask: float = 0.0,
        packing: bool = True,
    ):
        self.reader, self.seq_len, self.num_samples = Reader(prefix), seq_len, num_samples
        self.roles, self.scalar_loss_mask = read_roles(self.reader), scalar_loss_mask
        self.part = part_of(self.reader, split, part)
        lengths = self.reader.lengths[self.part.start : self.part.stop]
        check_fit(prefix, lengths, seq_len)
        self._firsts, self._sizes = self.reader.starts[self.part.start : self.part.stop], lengths - 1
        self._rows = lru_cache(maxsize=2)(lambda epoch: pack(lengths, seq_len, seed, epoch, packing))
        self.samples_per_epoch = len(self._rows(0))
        self.packing = packing

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Row:
        """Row `index`, counted over all epochs."""
        return self.read(np.array([index]))[0]

    def read(self, indices: NDArray[np.int64]) -> list[Row]:
        """Several rows: the chats of all of them are looked up at once. A label counts as its own role says."""
        rows = [np.array(self._chats(index)) for index in indices.tolist()]
        places = self._places(np.concatenate(rows))
        tokens, labels = (self.reader.tokens[at].astype(np.int64) for at in (places, places + 1))
        roles = self.roles.tokens[places + 1]
        weights, assistant = loss_weights(roles, self.scalar_loss_mask), roles == ASSISTANT
        found, start = [], 0
        for row in rows:
            *starts, length = np.cumsum(self._sizes[row]).tolist()
            own, start = slice(start, start + length), start + length
            full = self.seq_len if self.packing else length
            found.append(filled(Row(tokens[own], labels[own], weights[own], assistant[own], starts), full))
        return found

    def _chats(self, index: int) -> list[int]:
        """The chats of a row, counted from the part's first."""
        epoch, number = divmod(index, self.samples_per_epoch)
        return self._rows(epoch)[number]

    def _places(self, chats: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the .bin the tokens of chats are, end to end, without the last of each, which is a label only."""
        sizes = self._sizes[chats]
        ends = np.cumsum(sizes)
        return np.repeat(self._firsts[chats] - (ends - sizes), sizes) + np.arange(ends[-1])


def filled(row: Row, length: int) -> Row:
    """A row made longer, by a document of its own without weight."""
    room = length - len(row)
    if not room:
        return row
    filler = np.full(room, FILLER, np.int64)
    return Row(
        np.concatenate([row.tokens, filler]),
        np.concatenate([row.labels, filler]),
        np.concatenate([row.weights, np.zeros(room, np.float32)]),
        np.concatenate([row.assistant, np.zeros(room, np.bool_)]),
        [*row.starts, len(row)],
    )


def check_part(prefix: Path, split: list[float], part: str, seq_len: int) -> None:
    """UserError if a part of a dataset holds no tokens, or a chat that is too long."""
    reader = Reader(prefix)
    documents = part_of(reader, split, part)
    if roles_prefix(prefix):
        read_roles(reader)
        check_fit(prefix, reader.lengths[documents.start : documents.stop], seq_len)


def check_fit(prefix: Path, lengths: NDArray[np.int64], seq_len: int) -> None:
    """UserError if there are chats that no row has room for: they would have to be cut."""
    if not (lengths > 1).any():
        raise UserError(f"the {len(lengths):,} chats of {prefix} have a token each: nothing can be predicted")
    too_long = lengths > seq_len + 1
    if too_long.any():
        raise UserError(
            f"{too_long.sum():,} of {len(lengths):,} chats of {prefix} have more than {seq_len + 1:,} tokens, the"
            f" longest {lengths.max():,}, and seq_len {seq_len:,} has no room for them: raise seq_len, or tokenize with"
            f" max_length: {seq_len}, which splits long chats at turns, or drops them with over_long: drop"
        )


def open_samples(prefix: Path, *wanted: Any, **of_chats: Any) -> Samples | ChatSamples:
    """The samples of a dataset: chats where it has roles, else Megatron's windows of text.

    `wanted`: what both kinds take; `of_chats`: what only chats do.
    """
    return ChatSamples(prefix, *wanted, **of_chats) if roles_prefix(prefix) else Samples(prefix, *wanted)
