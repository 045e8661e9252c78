"""Rows to tokens: one encoder for each kind of corpus. A worker holds one, and takes blocks of rows."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.chat.rows import chat_encoder
from llmpipe.data.dataset.roles import DTYPE
from llmpipe.data.encoding.encoded import Encoded, Reject
from llmpipe.data.encoding.text_encoder import TextEncoder
from llmpipe.data.encoding.token_rows import TokenEncoder
from llmpipe.data.readers.block import BadRow, Block

Ids = Sequence[int] | NDArray[Any]
Document = tuple[Ids, Ids | None]
"""Its ids, none for an empty one, and its roles."""


class Encoder(Protocol):
    """What a kind of corpus needs of its rows, and what it makes of them."""

    keys: Sequence[str]
    """Columns to read; none stands for all."""
    optional: Sequence[str]
    """Columns to read where a file has them."""
    has_roles: bool
    """Whether documents come with roles (see `llmpipe.data.dataset.roles`): then the dataset has a file of them."""
    bos: bool
    append_eod: bool
    facts: dict[str, Any]
    """What else decides the tokens, for the manifest."""


class RowEncoder(Encoder, Protocol):
    """One that takes rows as objects."""

    def encode(self, rows: list[Any]) -> Sequence[Sequence[Document | None] | BadRow]:
        """The documents of each row; BadRow for a bad one, or a BadRow.

        Most rows are one document. A chat that is too long may be several; None is one that is left out for that.
        """
        ...


ENCODERS = {"text": TextEncoder, "chat": chat_encoder, "tokens": TokenEncoder}
"""By the corpus's kind."""


def encode_block(encoder: TextEncoder | RowEncoder, block: Block, dtype: np.dtype[Any]) -> Encoded:
    """The documents of a block, in tokens of this type."""
    return encoder.encode(block, dtype) if isinstance(encoder, TextEncoder) else _encode_rows(encoder, block, dtype)


def _encode_rows(encoder: RowEncoder, block: Block, dtype: np.dtype[Any]) -> Encoded:
    numbered = list(block.rows())
    rows = encoder.encode([row for _, row in numbered])
    rejects = [
        Reject.of(block, number, found)
        for (number, _), found in zip(numbered, rows, strict=True)
        if isinstance(found, BadRow)
    ]
    whole = [found for found in rows if not isinstance(found, BadRow)]
    documents = [document for found in whole for document in found if document is not None]
    good = [document for document in documents if len(document[0])]
    sizes = np.fromiter((len(ids) for ids, _ in good), np.int64, len(good))
    return Encoded(
        tokens=_laid_out([ids for ids, _ in good], dtype, int(sizes.sum())),
        sizes=sizes,
        roles=_laid_out([roles for _, roles in good if roles is not None], DTYPE, -1) if encoder.has_roles else None,
        empty=len(documents) - len(good),
        split=sum(len(found) > 1 for found in whole),
        dropped=sum(map(len, whole)) - len(documents),
        rejects=rejects,
        path=block.path,
        read=block.read,
    )


def _laid_out(rows: list[Ids], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Rows of numbers end to end."""
    if rows and isinstance(rows[0], np.ndarray):
        return np.concatenate(rows).astype(dtype, copy=False)
    return np.fromiter(chain.from_iterable(rows), dtype, count)
