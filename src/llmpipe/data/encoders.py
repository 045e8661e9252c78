"""Rows to tokens: one encoder for each kind of corpus. A worker holds one, and takes blocks of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmpipe.config import Corpus
from llmpipe.data.chat.rows import chat_encoder
from llmpipe.data.documents import document
from llmpipe.data.fast_encoder import FastEncoder
from llmpipe.data.readers.block import BadRow, Block
from llmpipe.data.roles import DTYPE
from llmpipe.data.token_rows import TokenEncoder
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

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
    """Whether documents come with roles (see `llmpipe.data.roles`): then the dataset has a file of them."""
    bos: bool
    append_eod: bool
    facts: dict[str, Any]
    """What else decides the tokens, for the manifest."""

    def encode(self, rows: list[Any]) -> Sequence[Sequence[Document | None] | BadRow]:
        """The documents of each row; BadRow for a bad one, or a BadRow.

        Most rows are one document. A chat that is too long may be several; None is one that is left out for that.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that is left out."""

    path: Path
    line: int
    """The line, or in files without lines the row, from 1."""
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """The documents of a block."""

    tokens: NDArray[Any]
    """Of all documents, laid end to end."""
    sizes: NDArray[np.int64]
    """Tokens of each document."""
    roles: NDArray[np.uint8] | None
    """Whose each token is, where the kind of corpus has roles."""
    empty: int
    """Documents without a token, which are left out."""
    split: int
    """Chats that were too long and are several documents."""
    dropped: int
    """Chats, or parts of such, that are too long and left out."""
    rejects: list[Reject]
    path: Path
    read: int
    """The bytes of the file that the block took."""


class TextEncoder:
    """Documents for continued pretraining, all of which is trained on."""

    optional: Sequence[str] = ()
    has_roles = False
    fast: FastEncoder | None = None
    """Encodes in the tokenizer's place."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self.keys: Sequence[str] = [corpus.text_key] if isinstance(corpus.text_key, str) else corpus.text_key
        self.separator, self.tokenizer = corpus.separator, tokenizer
        self.bos = tokenizer.add_bos if corpus.bos is None else corpus.bos
        self.append_eod, self.facts = corpus.append_eod, {"text_key": corpus.text_key, "separator": corpus.separator}
        for asked, token, name, option in (
            (self.bos, tokenizer.bos_id, "BOS", "--no-bos"),
            (self.append_eod, tokenizer.eos_id, "EOS", "--no-append-eod"),
        ):
            if asked and token < 0:
                raise UserError(f"{tokenizer.path} has no {name} token to mark documents with: say {option}")

    def encode(self, rows: list[Any]) -> list[list[Document] | BadRow]:
        texts = [self._text(row) for row in rows]
        found = iter(self._ids([text for text in texts if isinstance(text, bytes)]))
        return [text if isinstance(text, BadRow) else [(next(found), None)] for text in texts]

    def _ids(self, texts: list[bytes]) -> Sequence[Ids]:
        bos, eod = [self.tokenizer.bos_id] * self.bos, [self.tokenizer.eos_id] * self.append_eod
        if not texts:  # a block inside of one long line has no row
            return []
        if self.fast:
            return self.fast.encode_batch(texts, bos, eod)
        return [bos + ids + eod if ids else ids for ids in self.tokenizer.encode_batch(texts, 1)]

    def _text(self, row: Any) -> bytes | BadRow:
        try:
            return row if isinstance(row, BadRow) else document(row, self.keys, self.separator)
        except BadRow as error:
            return error


ENCODERS = {"text": TextEncoder, "chat": chat_encoder, "tokens": TokenEncoder}
"""By the corpus's kind."""


def encode_block(encoder: Encoder, block: Block, dtype: np.dtype[Any]) -> Encoded:
    """The documents of a block, in tokens of this type."""
    numbered = list(block.rows())
    rows = encoder.encode([row for _, row in numbered])
    rejects = [
        Reject(block.path, block.line(number), block.where(number), str(found))
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
