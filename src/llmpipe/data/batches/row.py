"""One row of a batch: what a model reads, what it is to say, and how much of that counts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Row:
    """T positions; T is seq_len, or less for a chat that is not packed."""

    tokens: NDArray[np.int64]
    """(T,)."""
    labels: NDArray[np.int64]
    """(T,) the token after each."""
    weights: NDArray[np.float32]
    """(T,) how much each label counts in the loss."""
    assistant: NDArray[np.bool_]
    """(T,) whether each label is a chat's assistant's; of text, none is."""
    starts: list[int]
    """The positions but 0 at which a document starts; what fills the row up is one."""

    def __len__(self) -> int:
        return len(self.tokens)


def window(tokens: NDArray[np.int64], boundaries: list[int]) -> Row:
    """A row of T + 1 tokens cut out of documents laid end to end, which start at `boundaries`."""
    weights = np.ones(len(tokens) - 1, np.float32)
    weights[np.array(boundaries, np.int64) - 1] = 0.0  # the label of a document's last token is another's first
    return Row(tokens[:-1], tokens[1:], weights, np.zeros(len(weights), np.bool_), boundaries)
