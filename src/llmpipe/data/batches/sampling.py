"""Which tokens make which sample: Megatron's GPT index over a split of a dataset, and the blend of several.

A sample is seq_len + 1 tokens of the shuffled documents laid end to end; neighbours share one token. All is a pure
function of the seed, the number of samples and the index: nothing is cached on disk.
"""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe import helpers
from llmpipe.data.dataset.indexed import Reader
from llmpipe.errors import UserError

PARTS = ("train", "validation", "test")
MOST_DATASETS = 32_766
"""Their numbers are int16, and Megatron takes fewer than 32,767."""
SURPLUS = 0.005
"""The datasets of a blend are asked for this share more than their weights say, as in Megatron; one alone is not."""


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
        wanted = self.part.start, self.part.stop, seq_len, num_samples, seed
        try:
            self.document_index, self.sample_index, self.shuffle_index = helpers.gpt_index(self.reader.lengths, *wanted)
        except ValueError as error:
            raise UserError(f"{prefix} cannot give {num_samples} samples of {seq_len} tokens: {error}") from error
        self.num_epochs = len(self.document_index) // len(self.part)
        tokens = self.reader.starts[self.part.stop] - self.reader.starts[self.part.start]
        self.samples_per_epoch = float(tokens) / seq_len

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], list[int]]:
        """The seq_len + 1 tokens of a sample, and the positions in it, but 0, at which a document starts."""
        return self.read(np.array([index]))[0]

    def read(self, indices: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], list[int]]]:
        """What `__getitem__` gives of each of several samples."""
        reader = self.reader
        index = self.document_index, self.sample_index.reshape(-1), self.shuffle_index
        tokens, starts, ends = helpers.read_samples(reader.tokens, reader.starts, *index, indices, self.seq_len)
        bounds = pairwise([0, *ends.tolist()])
        return [(row, starts[first:last].tolist()) for row, (first, last) in zip(tokens, bounds, strict=True)]


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
        if not 1 <= len(data) <= MOST_DATASETS:
            raise UserError(
                f"a blend takes 1 to {MOST_DATASETS:,} datasets, not {len(data):,}: join some with llmpipe merge"
            )
        for prefix, weight in data.items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of {prefix} is {weight}, but has to be above 0")
        sizes, weights = _normalized(list(data.values()), num_samples)
        self.weights = weights
        self.dataset_index, self.dataset_sample_index = helpers.blend_index(weights, num_samples)
        taken = np.bincount(self.dataset_index, minlength=len(data)).tolist()
        self.datasets = [
            _enough(lambda size, prefix=prefix: open_samples(prefix, split, part, seq_len, size, seed), size, count)
            for prefix, size, count in zip(data, sizes, taken, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Any:
        """What the datasets give: `Samples` a tuple."""
        return self.datasets[self.dataset_index[index]][self.dataset_sample_index[index]]

    def epoch(self, num_samples: int) -> float:
        """How often the first so many samples take the dataset that comes round the most often."""
        shares = zip(self.weights.tolist(), self.datasets, strict=True)
        return max(num_samples * weight / dataset.samples_per_epoch for weight, dataset in shares)

    def read(self, indices: NDArray[np.int64]) -> list[Any]:
        """What `__getitem__` gives of each of several samples; each dataset reads its own in one call."""
        numbers, samples = self.dataset_index[indices], self.dataset_sample_index[indices]
        found: list[Any] = [None] * len(indices)
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            for place, one in zip(places.tolist(), self.datasets[number].read(samples[places]), strict=True):
                found[place] = one
        return found


def _normalized(weights: list[float], num_samples: int) -> tuple[list[int], NDArray[np.float64]]:
    """The samples to ask of each dataset, and the weights of the blend, which Megatron divides by their sum twice."""
    once = np.array(weights, np.float64)
    once /= once.sum()
    if len(weights) == 1:
        return [num_samples], once
    sizes = [math.ceil(math.ceil(num_samples * weight) * (1 + SURPLUS)) for weight in once.tolist()]
    return sizes, once / once.sum()


def _enough(open_samples: Callable[[int], Any], size: int, taken: int) -> Any:
    """The samples of a dataset that a blend takes so many of: where Megatron's surplus is too small, Megatron fails."""
    samples = open_samples(size)
    return samples if len(samples) >= taken else open_samples(taken)
