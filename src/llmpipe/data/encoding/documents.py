"""The text of a row: one key's, or several keys' joined; keys lead into nested objects by dots. What rows make."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from llmpipe.data.readers.block import BadRow, Repeated, WholeText, listed, shown

T = TypeVar("T")
KINDS = {list: "a list", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def document(row: Any, keys: Sequence[str], separator: str) -> bytes:
    """The text of a row in UTF-8: what stands under its keys, joined, texts that are empty left out.

    A row that is a text, as a .txt file's, is the document itself. BadRow for a row without such a text.
    """
    if isinstance(row, WholeText):
        return encoded(row)
    if len(keys) == 1:
        return encoded(text(row, keys[0]))
    return encoded(separator.join(filter(None, [text(row, key) for key in keys])))


def text(row: Any, key: str) -> str:
    """The text under a key; BadRow for anything else."""
    found = value(row, key, " (--text-key, or text_key in the corpus)")
    if isinstance(found, bytes):  # a binary column
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise BadRow(f"is not UTF-8: byte 0x{found[error.start]:02X} in {key!r}") from error
    if not isinstance(found, str):
        raise BadRow(f"has {kind_of(found)} under {key!r}, but it has to be a text: {shown(str(found))}")
    return found


def value(row: Any, key: str, hint: str = "") -> Any:
    """What stands under a key; a name with dots that is not there leads into nested objects. `hint` ends the error."""
    if not isinstance(row, dict):
        raise BadRow(f'is {kind_of(row)}, but each row has to be an object like {{"{key}": "…"}}')
    if key in row:
        if isinstance(row, Repeated) and key in row.repeated:
            raise BadRow(f"has the key {key!r} more than once")
        return row[key]
    name, dot, rest = key.partition(".")
    if dot and isinstance(row.get(name), dict):
        return value(row[name], rest, hint)
    near = get_close_matches(key, list(row)[:20], n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise BadRow(f"has no key {key!r}, its keys are {listed(row)}{meant}{hint}")


def encoded(text: str) -> bytes:
    """A text in UTF-8; BadRow for half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        raise BadRow(f"has half of a surrogate pair in its text, {found}; mend or leave out the row") from error


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return "a text" if isinstance(value, str) else KINDS.get(type(value), "an object")


def of_each(rows: list[Any], documents: Callable[[Any], list[T]]) -> list[list[T] | BadRow]:
    """The documents of each row; BadRow for a bad one, or a BadRow."""
    return [_of(row, documents) for row in rows]


def _of(row: Any, documents: Callable[[Any], list[T]]) -> list[T] | BadRow:
    try:
        return row if isinstance(row, BadRow) else documents(row)
    except BadRow as error:
        return error
