"""JSON files: arrays of objects, or objects one after the other; cut into rows as the file is read, without parsing.

A row is all between two commas of an array, or a whole object outside of one. Brackets are counted, strings skipped.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmpipe.data.readers.block import BLOCK_BYTES, MAX_ROW_BYTES, BadRow, Block, Span, shown
from llmpipe.data.readers.lines import parsed
from llmpipe.data.readers.opened import Opened
from llmpipe.errors import UserError

_SPACE = re.compile(rb"\s*")
_IN_ARRAY = re.compile(rb'["\[\]{},]')
_IN_ROW = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Values(Block):
    """JSON texts of rows."""

    content: list[bytes]

    def rows(self) -> Iterator[tuple[int, Any]]:
        for number, value in enumerate(self.content, start=self.first):
            try:
                yield number, parsed(value)
            except BadRow as error:
                yield number, error


def blocks(span: Span, keys: Sequence[str], optional: Sequence[str]) -> Iterator[Block]:
    """The rows of a file, in the span that it begins in."""
    if not span.first:
        return
    with Opened(span.path) as file:
        number, before, rows, size = 1, 0, [], 0
        for row in _Cutter(file).rows():
            rows.append(row)
            size += len(row)
            if size >= BLOCK_BYTES:
                yield Values(span.path, number, file.position - before, rows)
                number, before, rows, size = number + len(rows), file.position, [], 0
        yield Values(span.path, number, file.position - before, rows)


class _Cutter:
    """Where rows begin and end. Of what is read, `data`, rows are cut off up to `start`; `at` is where to look on."""

    def __init__(self, file: Opened):
        self.file, self.data = file, file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        self.start = self.at = self.count = 0

    def rows(self) -> Iterator[bytes]:
        """The rows of all values of the file."""
        while (first := self._next()) is not None:
            if first == ord("["):
                self.at += 1
                self.start = self.at
                yield from self._elements()
            elif first == ord("{"):
                self._skip_row(0)
                yield self._cut_off()
            else:
                self._read_on()
                found = shown(self.data[self.at : self.at + 300])
                raise UserError(f"{self.file.path} is no JSON of objects: after {self.count} rows there is {found}")

    def _next(self) -> int | None:
        """The next character that is no space, None at the end."""
        while True:
            self.at = self.start = _SPACE.match(self.data, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.data):
                return self.data[self.at]
            if not self._read_on():
                return None

    def _elements(self) -> Iterator[bytes]:
        """The rows of an array, up to its end."""
        mark = b","
        while mark != b"]":
            mark = self._skip_row(1)
            if row := self._cut_off()[:-1].strip():
                yield row

    def _skip_row(self, outside: int) -> bytes:
        """Go behind the row's end: the comma or bracket after it in an array (1), else (0) its own last bracket."""
        depth = outside
        while True:
            marks = _IN_ARRAY if depth == outside == 1 else _IN_ROW
            found = marks.search(self.data, self.at)
            if not found:
                self.at = len(self.data)
                self._need_more()
                continue
            mark, self.at = found[0], found.end()
            if mark == b'"':
                self._skip_string()
            elif mark == b",":
                return mark
            else:
                depth += 1 if mark in b"[{" else -1
                if depth == 0:
                    return mark

    def _skip_string(self) -> None:
        while True:
            self.at = _IN_STRING.match(self.data, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.data) and self.data[self.at] == ord('"'):
                self.at += 1
                return
            self._need_more()

    def _cut_off(self) -> bytes:
        """What was looked through since the last cut."""
        row, self.start = self.data[self.start : self.at], self.at
        self.count += 1
        return row

    def _need_more(self) -> None:
        if not self._read_on():
            raise UserError(
                f"{self.file.path} ends inside row {self.count + 1}: it is truncated, or a bracket or quote is missing"
            )
        if len(self.data) > MAX_ROW_BYTES:
            raise UserError(f"{self.file.path} has a row of more than {MAX_ROW_BYTES:,} bytes, or a bracket is missing")

    def _read_on(self) -> bytes:
        """Read as much again as is held, so that a long row is not copied often."""
        chunk = self.file.read(max(BLOCK_BYTES, len(self.data) - self.start))
        self.data, self.at, self.start = self.data[self.start :] + chunk, self.at - self.start, 0
        return chunk
