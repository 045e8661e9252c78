"""The compiled helpers (cpp/): pure functions from arrays to new arrays; ValueError for bad input."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def byte_pointers(sizes: NDArray[np.int32], item_bytes: int, start: int = 0) -> NDArray[np.int64]:
    """The byte at which each sequence of a .bin starts, the first at `start`; sizes in tokens."""

def check_index(
    sizes: NDArray[np.int32],
    pointers: NDArray[np.int64],
    documents: NDArray[np.int64],
    item_bytes: int,
    bin_bytes: int,
) -> None:
    """ValueError with the first thing wrong: a negative size, pointers or document index off, another .bin size."""

def gpt_index(
    lengths: NDArray[np.int64], first: int, last: int, seq_len: int, num_samples: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32] | NDArray[np.int64], NDArray[np.uint32]]:
    """Megatron's document, sample and shuffle index over documents first..last-1, in as many epochs as needed.

    Sample k is the seq_len + 1 tokens from (document position, offset) = samples[order[k]] on; `samples` is (n + 1, 2).
    """

def blend_index(weights: NDArray[np.float64], num_samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Megatron's greedy blend: the dataset of each sample, and its number in that dataset; weights add up to 1."""

def gather(
    moves: NDArray[np.int64],
    files: NDArray[np.int64],
    row_bytes: int,
    first_row: int,
    last_row: int,
    out: NDArray[np.uint8],
) -> None:
    """Read rectangles of elements from files into rows first_row..last_row-1 of a tensor, which `out` holds.

    `moves`: ten numbers each, end to end: index into `files` (descriptors), rows, columns, item bytes; then, in bytes,
    from, from_row, from_column in the file, to, to_row, to_column in the whole tensor. OSError, RuntimeError for reads.
    """

def first_nonfinite(data: NDArray[np.uint8], item_bytes: int, exponent_bits: int) -> int:
    """The first element that is NaN or infinite, -1 if there is none."""

class Sha256:
    """SHA-256 by the processor's instructions; there is no such class where it has none."""

    def update(self, data: Buffer) -> None: ...
    def hexdigest(self) -> str: ...
    @staticmethod
    def update_two(a: Sha256, data_a: Buffer, b: Sha256, data_b: Buffer) -> None:
        """Go on with two streams, each by its own data, for little more than the price of one."""

def read_samples(
    tokens: NDArray[Any],
    starts: NDArray[np.int64],
    documents: NDArray[np.int32],
    samples: NDArray[np.int32] | NDArray[np.int64],
    order: NDArray[np.uint32],
    wanted: NDArray[np.int64],
    seq_len: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Samples `wanted` of `gpt_index`'s arrays, `samples` flat; `starts`: of documents in the tokens, and the end.

    Gives (n, seq_len + 1) tokens; where in them documents start, but at 0, sample by sample; and how many of those
    there are up to the end of each sample. ValueError if the arrays do not fit together.
    """

def json_texts(
    lines: Buffer, keys: list[str], separator: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], int]:
    """The documents of whole JSON lines: what stands under keys, joined, texts that are empty left out.

    Gives bytes, of which text i is offsets[i] to offsets[i + 1], with room behind the last; and the lines that are no
    plain object with a text under each key, which have an empty text: four numbers each, the text's, the line's, and
    the bytes from and to which it goes. Lines without anything give nothing. Last, how many lines there are.
    """

class Encoder:
    """Texts to token ids, by one tokenizer; for any threads at once, each with a cache of 42 MB."""

    def encode(
        self,
        texts: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        before: NDArray[np.int32],
        after: NDArray[np.int32],
    ) -> tuple[NDArray[np.uint16] | NDArray[np.int32], NDArray[np.int64]]:
        """The ids of texts in valid UTF-8, laid end to end, and how many each has; ids of 16 bits where all fit.

        Text i is bytes offsets[i] to offsets[i + 1]. `before` and `after` are ids around each text that has any. A size
        of -1: no ids, because the text has a character of which libraries do not all know what it is.
        """

def piece_encoder(
    pieces: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    scores: NDArray[np.float32],
    dummy_prefix: bool,
    merge_spaces: bool,
    unknown_id: int,
    own: NDArray[np.int32],
    byte_ids: NDArray[np.int32],
) -> Encoder:
    """An encoder as SentencePiece's BPE with the identity normalizer; pieces by id, empty where no text gives them.

    `own`: ids of pieces that a user defined, which are found before anything is merged.
    `byte_ids`: of the 256 bytes, to which unknown characters fall back; none: they are `unknown_id`.
    """

def byte_encoder(
    tokens: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    merges: NDArray[np.int32],
    whole_units: bool,
    split: str,
) -> Encoder:
    """An encoder of byte-level BPE; tokens by id, empty where no text gives them; `split`: gpt2, llama3, qwen2, tekken.

    `merges`: three ids a line, left, right and what they become, best first; none: two tokens merge to any token that
    they are together, the lowest id first. `whole_units`: what the split finds is one token where it is one.
    """
