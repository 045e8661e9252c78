"""Which tokens make which sample: Megatron's GPT index over a split of a dataset, and the blend of several.

A sample is seq_len + 1 tokens of the shuffled documents laid end to end; neighbours share one token. All is a pure
function of the seed, the number of samples and the index: nothing is cached on disk.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe import helpers
from llmpipe.data.indexed import Reader
from llmpipe.errors import UserError

PARTS = ("train", "validation", "test")
SURPLUS = 0.005
"""A dataset of a blend gives up to this share more than its weight says, as in Megatron."""


def split_documents(num_documents: int, split: list[float], part: str) -> range:
    """The documents of one part: shares of all, contiguous, rounded at their borders as Megatron does."""
    if len(split) != len(PARTS) or min(split) < 0 or sum(split) <= 0:
        raise UserError(f"split {split} has to be three shares, of {', '.join(PARTS)}, none negative and not all 0")
    shares = np.array(split, np.float64)
    borders = [round(border * num_documents) for border in accumulate([0.0, *(shares / shares.sum()).tolist()])]
    number = PARTS.index(part)
    return range(borders[number], borders[number + 1])


def part_of(reader: Reader, split: list[float], part: str) -> range:
    """The documents of one part; UserError if they hold no tokens."""
    documents = split_documents(reader.num_documents, split, part)
    if reader.starts[documents.start] == reader.starts[documents.stop]:
        raise UserError(
            f"the {part} part of {reader.prefix} holds no tokens: split {split} gives it {len(documents)} of"
            f" {reader.num_documents} documents; give it a larger share"
        )
    return documents


class Samples:
    """The samples of one part of one dataset, as many as asked for, in as many epochs as that takes."""

    def __init__(self, prefix: Path, split: list[float], part: str, seq_len: int, num_samples: int, seed: int):
        if not 0 <= seed < 2**32:
            raise UserError(
                f"seed {seed} has to be 0 to {2**32 - 1}: NumPy's generator, which Megatron uses, takes no other"
            )
        self.reader, self.seq_len = Reader(prefix), seq_len
        self.part = part_of(self.reader, split, part)
        lengths = self.reader.lengths
        self._documents, self._samples, self._order = helpers.gpt_index(
            lengths, self.part.start, self.part.stop, seq_len, num_samples, seed
        )
        self.num_epochs = len(self._documents) // len(self.part)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], list[int]]:
        """The seq_len + 1 tokens of a sample, and the positions in it, but 0, at which a document starts."""
        position, offset = self._samples[self._order[index]]
        tokens, boundaries, filled = np.empty(self.seq_len + 1, np.int64), [], 0
        while True:
            part = self.reader.read(int(self._documents[position]), offset, len(tokens) - filled)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(tokens):
                return tokens, boundaries
            position, offset = position + 1, 0
            if filled and boundaries[-1:] != [filled]:  # once, where an empty document stands between
                boundaries.append(filled)


class Blend:
    """Samples of several datasets in the proportion of their weights."""

    def __init__(
        self,
        data: dict[Path, float],
        split: list[float],
        part: str,
        seq_len: int,
        num_samples: int,
        seed: int,
        open_samples: Callable[..., Any] = Samples,
    ):
        """`open_samples` is called as `Samples` is, for datasets that may be of another kind."""
        for prefix, weight in data.items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of {prefix} is {weight}, but has to be above 0")
        shares = np.array(list(data.values()), np.float64)
        weights = shares / shares.sum()
        self.datasets = [
            open_samples(prefix, split, part, seq_len, _with_surplus(num_samples, weight), seed)
            for prefix, weight in zip(data, weights.tolist(), strict=True)
        ]
        self._dataset, self._sample = helpers.blend_index(weights, num_samples)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        """What the datasets give: `Samples` a tuple."""
        return self.datasets[self._dataset[index]][self._sample[index]]


def _with_surplus(num_samples: int, weight: float) -> int:
    """The samples to ask of a dataset: rounded up, and always more than the greedy blend can take."""
    return math.ceil(math.ceil(num_samples * weight) * (1 + SURPLUS))
