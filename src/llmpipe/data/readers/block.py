"""What every reader gives: blocks, some rows of one file as they lie in it, which are parsed where they are encoded."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
"""About how much of a file a block holds: what one worker takes at a time."""
MAX_ROW_BYTES = 1 << 30
"""A longer row is no document but a broken file: it would be held whole."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a file's bytes. The rows that begin in it belong to it, so that spans side by side share no row."""

    path: Path
    start: int
    stop: int
    size: int
    """Of the whole file."""

    @property
    def first(self) -> bool:
        """Whether the file begins in it; a file that cannot be cut, as a .gz, belongs to that span as a whole."""
        return self.start == 0


def whole(path: Path) -> Span:
    """The span that is all of a file."""
    size = path.stat().st_size
    return Span(path, 0, size, size)


class WholeText(str):
    """A row that is a document itself, as a .txt file's."""

    __slots__ = ()


class Repeated(dict[str, Any]):
    """An object of a row that has keys more than once, of which the last counts in JSON."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = {name for name in names if names.count(name) > 1}


class BadRow(Exception):
    """What is wrong with a row: the words that follow its place, as in "is not JSON"."""


@dataclass(frozen=True, slots=True)
class Block(ABC):
    """Some rows of one file; it travels to another process, and is parsed there."""

    path: Path
    first: int
    """The number of its first row, from 1."""
    read: int
    """How many bytes of the file were read since the block before."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Any]]:
        """Each row's number and what it holds: an object, a WholeText, what else JSON has, or BadRow."""

    def where(self, number: int) -> str:
        """The place of a row, for an error."""
        return f"{self.path}, row {number}"

    def line(self, number: int) -> int:
        """The row's number in the file."""
        return number


def shown(text: str | bytes) -> str:
    """The beginning of a row, for an error."""
    text = text if isinstance(text, str) else text[:240].decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:60] + "…")


def decoded(data: bytes) -> str:
    """UTF-8 as text; BadRow with the byte that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[max(0, error.start - 20) : error.start].decode(errors="replace")
        found = f"byte 0x{data[error.start]:02X} after {before!r}"
        raise BadRow(f"is not UTF-8: {found}; convert the file to UTF-8") from error


def listed(names: Iterable[str]) -> str:
    """The first of some names, for an error."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(shown(name) for name in names[:20]) + more if names else "none"
