"""Corpus files: which files an input stands for, and their documents one after the other."""

import codecs
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from llmpipe.errors import UserError, nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
log = logging.getLogger(__name__)


def find_files(inputs: list[Path]) -> list[Path]:
    """The corpus files, those of a directory sorted; UserError for what is missing or of another kind."""
    return [file for path in inputs for file in _expand(path)]


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _walk(path)
    if not path.exists():
        raise UserError(f"{path} is missing: name a file or a directory of {', '.join(SUFFIXES)} files")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} is of a kind that llmpipe tokenize does not read: it reads {', '.join(SUFFIXES)}")
    return [path]


def _walk(directory: Path) -> list[Path]:
    """The corpus files below a directory; hidden ones do not count."""
    below = (path for path in directory.rglob("*") if path.is_file())
    files = sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(directory).parts))
    found = [path for path in files if path.name.endswith(SUFFIXES)]
    if not found:
        raise UserError(f"{directory} holds no {', '.join(SUFFIXES)} file, though {len(files)} other files")
    if len(found) < len(files):
        other = next(path for path in files if path not in found)
        log.warning(
            "%s: %d files of other kinds are left out, such as %s", directory, len(files) - len(found), other.name
        )
    return found


def documents(path: Path, text_key: str, read: Callable[[int], None]) -> Iterator[bytes]:
    """The documents of one file in UTF-8, checked; `read` is told the bytes of the file as they are read.

    A .txt file is one document; a line of a .jsonl file is one, and a blank line is none. The byte order mark that
    some editors begin a file with is no text.
    """
    if path.name.endswith(".txt"):
        data = path.read_bytes()
        _decoded(data, path, first_line=1)
        read(len(data))
        yield data.removeprefix(codecs.BOM_UTF8)
        return
    with path.open("rb") as raw:
        before = 0
        for number, line in enumerate(_lines(raw, path), start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _text(_decoded(line.strip(), path, number), text_key, f"{path}, line {number}")
            position = raw.tell()
            read(position - before)
            before = position
        read(path.stat().st_size - before)


def _lines(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked; UserError for a damaged .gz."""
    if not path.name.endswith(".gz"):
        yield from raw
        return
    try:
        yield from gzip.GzipFile(fileobj=raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or no gzip file: {error}") from error


def _text(line: str, key: str, where: str) -> bytes:
    """The document of a JSON line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}: character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where} is not JSON ({reason}): {_shown(line)}") from error
    if not isinstance(value, dict):
        raise UserError(f'{where} is {_KINDS[type(value)]}, but each line has to be an object like {{"{key}": "…"}}')
    if key not in value:
        names = ", ".join(repr(name) for name in value) or "none"
        hint = f"; {nearest(key, value)}" if value else ""
        raise UserError(
            f"{where} has no key {key!r}, its keys are {names}{hint} (--text-key, or text_key in the corpus)"
        )
    if not isinstance(value[key], str):
        kind = _KINDS.get(type(value[key]), "an object")
        raise UserError(f"{where}: {key!r} is {kind}, but has to be a text: {_shown(line)}")
    return _encoded(value[key], where)


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        raise UserError(
            f"{where}: the text has half of a surrogate pair, {found}; mend or leave out the line"
        ) from error


def _decoded(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        before = data[max(0, error.start - 20) : error.start].decode(errors="replace")
        found = f"byte 0x{data[error.start]:02X} after {before!r}"
        raise UserError(f"{path}, line {line} is not UTF-8: {found}; convert the file to UTF-8") from error


def _shown(line: str) -> str:
    """The beginning of a line, for an error."""
    return repr(line if len(line) <= 60 else line[:60] + "…")
