"""Where the numbers of a tensor lie in a file, whatever the file's format."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: element (i, j) is at byte offset + itemsize * (i * strides[0] + j * strides[1])."""

    file: Path
    offset: int
    """Bytes from the file's beginning."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
