"""What an encoder makes of a block: tokens of its documents, and what was left out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.readers.block import BadRow, Block


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that is left out."""

    path: Path
    line: int
    """The line, or in files without lines the row, from 1."""
    where: str
    reason: str

    @classmethod
    def of(cls, block: Block, number: int, error: BadRow) -> "Reject":
        return cls(block.path, block.line(number), block.where(number), str(error))


@dataclass(frozen=True, slots=True)
class Encoded:
    """The documents of a block."""

    tokens: NDArray[Any]
    """Of all documents, laid end to end."""
    sizes: NDArray[np.int64]
    """Tokens of each document."""
    rejects: list[Reject]
    path: Path
    read: int
    """The bytes of the file that the block took."""
    empty: int
    """Documents without a token, which are left out."""
    split: int = 0
    """Chats that were too long and are several documents."""
    dropped: int = 0
    """Chats, or parts of such, that are too long and left out."""
    roles: NDArray[np.uint8] | None = None
    """Whose each token is, where the kind of corpus has roles."""
