"""JSON lines: a row a line; blank lines are none. A plain file is cut anywhere, a packed one not at all."""

import codecs
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmpipe.data.readers.block import BLOCK_BYTES, MAX_ROW_BYTES, BadRow, Block, Repeated, Span, decoded, shown
from llmpipe.data.readers.opened import Opened, is_packed
from llmpipe.errors import UserError

READ_BYTES = 1 << 18
"""A piece of a plain file that stays in a core's cache while its lines are parsed."""


@dataclass(frozen=True, slots=True)
class LineBlock(Block):
    """Lines, of a plain file or a packed one."""

    @abstractmethod
    def lines(self) -> Iterator[bytes]:
        """All lines, some whole ones after the other."""

    def rows(self) -> Iterator[tuple[int, Any]]:
        number = self.first
        for content in self.lines():
            yield from rows_of(content, number)
            number += content.count(b"\n")

    def where(self, number: int) -> str:
        return f"{self.path}, line {self.line(number)}"


@dataclass(frozen=True, slots=True)
class LineSpan(LineBlock):
    """The lines that begin in a span of a plain file, read where they are parsed; numbered from the first of them."""

    span: Span

    def lines(self) -> Iterator[bytes]:
        with Opened(self.path, max(self.span.start - 1, 0)) as file:
            yield from _whole_lines(file, self.span)

    def line(self, number: int) -> int:
        return number + _lines_before(self.path, self.span.start)


@dataclass(frozen=True, slots=True)
class Lines(LineBlock):
    """Some lines of a packed file."""

    content: bytes

    def lines(self) -> Iterator[bytes]:
        yield self.content


def blocks(span: Span, keys: Sequence[str], optional: Sequence[str]) -> Iterator[Block]:
    """The lines of a span: of a plain file only where they are, of a packed one themselves."""
    if is_packed(span.path):
        yield from _packed_blocks(span) if span.first else ()
        return
    for start in range(span.start, span.stop, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, span.stop)
        yield LineSpan(span.path, 1, stop - start, Span(span.path, start, stop, span.size))


def _packed_blocks(span: Span) -> Iterator[Block]:
    with Opened(span.path) as file:
        number, before = 1, 0
        for content in _whole_lines(file, span):
            yield Lines(span.path, number, file.position - before, content)
            number, before = number + content.count(b"\n"), file.position


def rows_of(content: bytes, number: int) -> Iterator[tuple[int, Any]]:
    """The rows of whole lines, of which the first has this number."""
    try:
        lines: Sequence[str | bytes] = content.decode().split("\n")
    except UnicodeDecodeError:
        lines = [_decoded(line) for line in content.split(b"\n")]
    for at, line in enumerate(lines, start=number):
        if line and not line.isspace():
            yield at, _parsed(line)


def _decoded(line: bytes) -> str | bytes:
    """A line as text, if it is UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line


def _whole_lines(file: Opened, span: Span) -> Iterator[bytes]:
    """Chunks that end with a line's end; the last one may end with the file instead.

    A line belongs to a span if its first byte does. So the file is opened a byte before the span, and all up to the
    first line's end is of the span before. A packed file is one span.
    """
    stop, size = (math.inf, BLOCK_BYTES) if is_packed(span.path) else (span.stop, READ_BYTES)
    skipping, first, begun, begun_bytes, at = not span.first, span.first, [], 0, 0 if span.first else span.start - 1
    while chunk := file.read(size):
        start, at = at, at + len(chunk)
        if skipping:
            cut = chunk.find(b"\n") + 1
            if start + (cut or len(chunk)) >= stop:
                return
            skipping, chunk, start = not cut, chunk[cut:] if cut else b"", start + cut
        last = chunk.find(b"\n", int(max(stop - 1 - start, 0))) + 1 if at >= stop else 0
        if end := last or chunk.rfind(b"\n") + 1:
            begun.append(chunk[:end])
            yield _put_together(begun, first)
            first, begun_bytes, chunk = False, 0, chunk[end:]
        if last:
            return
        begun.append(chunk)
        begun_bytes += len(chunk)
        if begun_bytes > MAX_ROW_BYTES:
            raise UserError(f"{span.path} has a line of more than {MAX_ROW_BYTES:,} bytes: is it no .jsonl file?")
    if any(begun):
        yield _put_together(begun, first)


def _put_together(begun: list[bytes], first: bool) -> bytes:
    """The pieces as one, without the byte order mark of the first line; they are given up, as a line may be large."""
    content = b"".join(begun)
    begun.clear()
    return content.removeprefix(codecs.BOM_UTF8) if first else content


def _parsed(line: str | bytes) -> Any:
    """What a line holds; BadRow, not raised, for what is not JSON."""
    try:
        return parsed(line)
    except BadRow as error:
        return error


def parsed(line: str | bytes) -> Any:
    """What a JSON text in UTF-8 holds; BadRow for what is not JSON."""
    line = line if isinstance(line, str) else decoded(line)
    try:
        return json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}: character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise BadRow(f"is not JSON ({reason}): {shown(line.strip())}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(pairs)


@lru_cache(maxsize=8)
def _lines_before(path: Path, start: int) -> int:
    """The lines that begin before a byte of a file, counted only when an error is to name one."""
    count, left = int(start > 0), start - 1  # the first line, and one after each line's end up to the byte before
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 8 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count
