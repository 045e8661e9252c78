"""JSON lines: a row a line; blank lines are none. A plain file is cut anywhere, a packed one not at all."""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmpipe.data.readers.block import BLOCK_BYTES, MAX_ROW_BYTES, BadRow, Block, Repeated, Span, decoded, shown
from llmpipe.data.readers.opened import Opened, is_packed
from llmpipe.errors import UserError


@dataclass(frozen=True, slots=True)
class Lines(Block):
    """Whole lines; `first` counts from 1 at the byte `origin` of the file."""

    content: bytes
    origin: int

    def rows(self) -> Iterator[tuple[int, Any]]:
        try:
            lines: Sequence[str | bytes] = self.content.decode().split("\n")
        except UnicodeDecodeError:
            lines = self.content.split(b"\n")
        for number, line in enumerate(lines, start=self.first):
            if line and not line.isspace():
                yield number, _parsed(line)

    def where(self, number: int) -> str:
        return f"{self.path}, line {self.line(number)}"

    def line(self, number: int) -> int:
        return number + (_lines_before(self.path, self.origin) if self.origin else 0)


def blocks(span: Span, keys: Sequence[str], optional: Sequence[str]) -> Iterator[Block]:
    """The lines of a span."""
    if is_packed(span.path) and not span.first:
        return
    with Opened(span.path, max(span.start - 1, 0)) as file:
        number, before, at = 1, file.position, 0 if span.first else None
        for start, content in _whole_lines(file, span):
            at = start if at is None else at
            read, before = file.position - before, file.position
            yield Lines(span.path, number, read, content.removeprefix(codecs.BOM_UTF8) if start == 0 else content, at)
            number += content.count(b"\n")


def _whole_lines(file: Opened, span: Span) -> Iterator[tuple[int, bytes]]:
    """Chunks that end with a line's end, and where each starts; the last one may end with the file instead.

    A line belongs to a span if its first byte does: from the byte before the span, all up to the first line's end is
    of the span before.
    """
    skipping, begun, begun_bytes, at = not span.first, [], 0, file.position
    stop = None if is_packed(span.path) else span.stop
    while chunk := file.read(BLOCK_BYTES):
        chunk_start, at = at, at + len(chunk)
        if skipping:
            cut = chunk.find(b"\n") + 1
            if not cut:
                continue
            skipping, chunk, chunk_start = False, chunk[cut:], chunk_start + cut
            if stop is not None and chunk_start >= stop:
                return
        end = chunk.rfind(b"\n") + 1
        last = 0
        if stop is not None and at >= stop:
            last = chunk.find(b"\n", max(stop - 1 - chunk_start, 0)) + 1
        if end:
            cut = last or end
            yield chunk_start - begun_bytes, b"".join([*begun, chunk[:cut]])
            if last:
                return
            begun, begun_bytes, chunk = [], 0, chunk[cut:]
        begun.append(chunk)
        begun_bytes += len(chunk)
        if begun_bytes > MAX_ROW_BYTES:
            raise UserError(f"{span.path} has a line of more than {MAX_ROW_BYTES:,} bytes: is it no .jsonl file?")
    if begun_bytes:
        yield at - begun_bytes, b"".join(begun)


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
def _lines_before(path: Path, origin: int) -> int:
    """The lines before a byte of a file, counted only when an error is to name one."""
    count = 0
    with path.open("rb") as file:
        while origin and (chunk := file.read(min(origin, 8 << 20))):
            count += chunk.count(b"\n")
            origin -= len(chunk)
    return count
