"""EasyLM's field grammar: what of a row is written down, in which order, and what of it is trained on.

    [question+prompt],answer

- Fields are separated by commas; each is tokenized on its own, and their tokens are laid end to end.
- `a+b` is one text of two keys, joined by a separator (a space in EasyLM).
- `[…]` around a field: no loss on it.
- `<|bos|>` and `<|eos|>` are those tokens, `<|13|>` is the token 13.
- `{key}` holds tokens themselves: little-endian int32 in base64.

As EasyLM's TextProcessor has it (`fields`, `subfield_separator`, `base64_token_dtype` i4); mistakes are told.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpipe.data.encoding.documents import encoded, text
from llmpipe.data.readers.block import BadRow
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

_TOKEN = re.compile(r"<\|(bos|eos|\d+)\|>")
_KEY = re.compile(r"[^\[\]{}<>|,+]+")


@dataclass(frozen=True, slots=True)
class Field:
    """One field; of `keys`, `token` and `base64_key` one is given."""

    trained: bool
    keys: tuple[str, ...] = ()
    token: str = ""
    """bos, eos or a number."""
    base64_key: str = ""


def parse(grammar: str) -> list[Field]:
    """The fields of `[question+prompt],answer`; UserError, naming the field, for anything else."""
    return [_field(part, grammar) for part in grammar.split(",")]


def _field(part: str, grammar: str) -> Field:
    trained = not (part.startswith("[") and part.endswith("]"))
    inner = part if trained else part[1:-1]
    if found := _TOKEN.fullmatch(inner):
        return Field(trained, token=found[1])
    if inner.startswith("{") and inner.endswith("}") and _KEY.fullmatch(inner[1:-1]):
        return Field(trained, base64_key=inner[1:-1])
    keys = tuple(inner.split("+"))
    if not all(_KEY.fullmatch(key) for key in keys):
        raise UserError(
            f"fields is {grammar!r}, but {part!r} in it is no field: keys as in [question+prompt],answer, a token as"
            " <|bos|>, <|eos|> or <|13|>, or {key} are"
        )
    return Field(trained, keys=keys)


def encode(row: Any, fields: list[Field], tokenizer: Tokenizer, separator: str = " ") -> tuple[list[int], list[bool]]:
    """The ids of a row, and whether each is trained on; BadRow for a row without one of the texts."""
    ids: list[int] = []
    trained: list[bool] = []
    for field in fields:
        more = _ids(row, field, tokenizer, separator)
        ids += more
        trained += [field.trained] * len(more)
    return ids, trained


def _ids(row: Any, field: Field, tokenizer: Tokenizer, separator: str) -> list[int]:
    if field.keys:
        whole = separator.join(text(row, key) for key in field.keys)
        encoded(whole)  # may have half of a surrogate pair
        return tokenizer.encode(whole)
    if field.base64_key:
        return _packed_ids(text(row, field.base64_key), field.base64_key, tokenizer.vocab_size)
    marks = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    token = marks[field.token] if field.token in marks else int(field.token)
    if not 0 <= token < tokenizer.vocab_size:
        raise UserError(f"fields has <|{field.token}|>, but {tokenizer.path} has no such token")
    return [token]


def _packed_ids(packed: str, key: str, vocab_size: int) -> list[int]:
    try:
        ids = np.frombuffer(base64.b64decode(packed, validate=True), "<i4")
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"has something else than int32 in base64 under {key!r}: {error}") from error
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise BadRow(f"has the token {ids.min() if ids.min() < 0 else ids.max()} under {key!r}, which there is not")
    return ids.tolist()
