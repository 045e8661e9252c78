"""What a training reads of a dataset: lengths of documents, how full its sequences are, how much of them is trained."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.batches.packing import pack
from llmpipe.data.batches.sampling import part_of
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.dataset.roles import ASSISTANT, read_roles, roles_prefix

_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of one part (train, validation, test) of a dataset, in one epoch."""

    documents: int
    tokens: int
    shortest: int
    """Tokens in a document; so are the next three."""
    median: float
    mean: float
    longest: int
    ranges: list[tuple[int, int, int]]
    """First and last length, and how many documents are so long: a range for each power of two."""
    packing_use: float | None
    """The share of the sequences' positions that hold a document's token; None for chats that are not packed."""
    mask_share: float
    """The share of these positions whose next token is trained."""


def statistics(
    prefix: Path,
    split: list[float],
    part: str,
    seq_len: int,
    seed: int,
    packing: bool = True,
    isolate_documents: bool = True,
) -> Statistics:
    """The statistics of a part of a dataset for a recipe; UserError for files that do not fit together."""
    reader = Reader(prefix)
    documents = part_of(reader, split, part)
    lengths = reader.lengths[documents.start : documents.stop]
    if roles_prefix(prefix):
        use = _chat_use(lengths, seq_len, seed) if packing else None
        mask = _assistant_share(reader, documents)
    else:  # texts lie end to end, and of each the last token's label is another document's first
        use = 1.0
        mask = 1 - np.count_nonzero(lengths) / int(lengths.sum()) if isolate_documents else 1.0
    return Statistics(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        ranges=length_ranges(lengths),
        packing_use=use,
        mask_share=mask,
    )


def length_ranges(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """First length, last length and how many documents are so long, for each power of two from the shortest on."""
    powers = np.frexp(lengths)[1]  # 0 for 0, else 1 + floor(log2)
    counts = np.bincount(powers)
    firsts = [2 ** (power - 1) if power else 0 for power in range(len(counts) + 1)]
    lasts = [max(first - 1, 0) for first in firsts[1:]]
    return [(firsts[power], lasts[power], int(counts[power])) for power in range(int(powers.min()), len(counts))]


def _chat_use(lengths: NDArray[np.int64], seq_len: int, seed: int) -> float:
    """A chat of L tokens takes L - 1 positions, see `llmpipe.data.batches.packing`."""
    rows = pack(lengths, seq_len, seed, epoch=0)
    return int(np.maximum(lengths - 1, 0).sum()) / (len(rows) * seq_len)


def _assistant_share(reader: Reader, documents: range) -> float:
    """The assistant's among the labels, which are all tokens but each chat's first."""
    roles = read_roles(reader).tokens
    start, stop = int(reader.starts[documents.start]), int(reader.starts[documents.stop])
    firsts = reader.starts[documents.start : documents.stop][reader.lengths[documents.start : documents.stop] > 0]
    trained = sum(int((roles[at : min(stop, at + _CHUNK)] == ASSISTANT).sum()) for at in range(start, stop, _CHUNK))
    trained -= int((roles[firsts] == ASSISTANT).sum())
    return trained / (stop - start - len(firsts))
