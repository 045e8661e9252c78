"""Documents laid end to end, as the compiled encoder takes them: those of JSON lines without an object for each row.

The compiled scanner takes lines that are objects with a text under each key, once. Every other line is for Python's
json, which has the last word on what JSON is and on what is wrong with a line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe import helpers
from llmpipe.data.encoding.documents import document
from llmpipe.data.readers.block import BadRow, Block
from llmpipe.data.readers.lines import LineBlock, rows_of
from llmpipe.data.tokenizers.compiled import packed

BadRows = list[tuple[int, BadRow]]
"""With their numbers."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts in UTF-8."""

    content: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    """(N + 1,) where each starts, and where the last one ends."""

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> "Texts":
        return cls(*packed(texts))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> bytes:
        return self.content[self.offsets[number] : self.offsets[number + 1]].tobytes()


def texts_of(block: Block, keys: Sequence[str], separator: str) -> Iterator[tuple[Texts, BadRows]]:
    """The documents of a block in their order, some at a time, and the rows that have none."""
    if not isinstance(block, LineBlock) or not are_plain(keys, separator):
        yield _of_rows(block.rows(), keys, separator)
        return
    number = block.first
    for lines in block.lines():
        content, offsets, odd, count = helpers.json_texts(lines, list(keys), separator)
        texts, bad = Texts(content, offsets), []
        if len(odd):
            texts, bad = _with_odd(texts, odd.reshape(-1, 4).tolist(), lines, number, keys, separator)
        del lines  # a line may be large
        yield texts, bad
        number += count


def are_plain(keys: Sequence[str], separator: str) -> bool:
    """Whether the scanner knows what the keys mean: none leads into nested objects."""
    try:
        "".join([*keys, separator]).encode()
    except UnicodeEncodeError:  # a name from a command line that is not UTF-8
        return False
    return len(set(keys)) == len(keys) and not any("." in key for key in keys)


def _of_rows(rows: Iterator[tuple[int, Any]], keys: Sequence[str], separator: str) -> tuple[Texts, BadRows]:
    texts: list[bytes] = []
    bad: BadRows = []
    for number, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            texts.append(document(row, keys, separator))
        except BadRow as error:
            bad.append((number, error))
    return Texts.of(texts), bad


def _with_odd(
    texts: Texts, odd: list[list[int]], lines: bytes, number: int, keys: Sequence[str], separator: str
) -> tuple[Texts, BadRows]:
    """Texts with those of the lines that the scanner left out, which are empty there."""
    found, bad, at = list[bytes](), BadRows(), 0
    for text, line, start, stop in odd:
        more, worse = _of_rows(rows_of(lines[start:stop], number + line), keys, separator)
        found += [*(texts[i] for i in range(at, text)), *more]
        bad += worse
        at = text + 1
    found += [texts[i] for i in range(at, len(texts))]
    return Texts.of(found), bad
