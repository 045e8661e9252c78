"""Plain text: a file is one document."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmpipe.data.readers.block import MAX_ROW_BYTES, BadRow, Block, Span, WholeText, decoded
from llmpipe.data.readers.opened import Opened
from llmpipe.errors import UserError


@dataclass(frozen=True, slots=True)
class Text(Block):
    """The whole file. A byte order mark, which some editors begin a file with, is no text."""

    content: bytes

    def rows(self) -> Iterator[tuple[int, Any]]:
        try:
            yield 1, WholeText(decoded(self.content.removeprefix(codecs.BOM_UTF8)))
        except BadRow as error:
            cause = error.__cause__
            assert isinstance(cause, UnicodeDecodeError)
            yield 1 + cause.object.count(b"\n", 0, cause.start), error

    def where(self, number: int) -> str:
        return f"{self.path}, line {number}"


def blocks(span: Span, keys: Sequence[str], optional: Sequence[str]) -> Iterator[Block]:
    """The document of a file, in the span that it begins in."""
    if span.first:
        with Opened(span.path) as file:
            yield Text(span.path, 1, span.size, _all(file))


def _all(file: Opened) -> bytes:
    chunks, size = [], 0
    while chunk := file.read(8 << 20):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ROW_BYTES:
            raise UserError(f"{file.path} is one document of more than {MAX_ROW_BYTES:,} bytes: cut it up")
    return b"".join(chunks)
