"""Rows that are tokens already: `input_ids`, with `labels` of -100 for what is not trained on, and `attention_mask`.

The ids are taken as they are: no BOS or EOS is added. `labels` are as Hugging Face has them, at the same place as their
ids. Tokens with an attention_mask of 0, which is padding, are left out.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.config import Corpus
from llmpipe.data.dataset.roles import ASSISTANT, USER
from llmpipe.data.encoding.documents import kind_of, of_each, value
from llmpipe.data.readers.block import BadRow
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

log = logging.getLogger(__name__)

IGNORED = -100
IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
Row = tuple[NDArray[Any], NDArray[Any] | None]


class TokenEncoder:
    """Checks rows of ids; with labels, trained tokens get the assistant's role and others the user's."""

    keys: Sequence[str] = (IDS,)
    optional: Sequence[str] = (LABELS, MASK)
    has_roles = False
    bos = append_eod = False
    facts: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        if corpus.bos:
            raise UserError("bos: true does not go with kind: tokens, which are taken as they are")
        self.vocab_size, self.said = tokenizer.vocab_size, corpus.labels

    def look_at(self, row: Any) -> None:
        """Whether the corpus has labels is what its first row says; UserError if the corpus file says otherwise."""
        self.has_roles = isinstance(row, dict) and row.get(LABELS) is not None
        if self.said is not None and self.said != self.has_roles:
            found = "has" if self.has_roles else "has no"
            raise UserError(
                f"the corpus's first row {found} {LABELS}, but the corpus says labels: {str(self.said).lower()}: mend"
                " one of them"
            )
        if self.has_roles and self.said is None:
            log.info("rows have labels; in a project's corpus file, labels: true declares the roles to the workflow")

    def encode(self, rows: list[Any]) -> list[list[Row] | BadRow]:
        return of_each(rows, lambda row: [self._row(row)])

    def _row(self, row: Any) -> Row:
        ids = _numbers(row, IDS)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            at = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            raise BadRow(f"has the token {ids[at]} in {IDS!r}[{at}], but the tokenizer has {self.vocab_size:,} tokens")
        kept = _kept(row, len(ids))
        if (row.get(LABELS) is not None) != self.has_roles:
            has, others = ("no labels", "has them") if self.has_roles else ("labels", "has none")
            raise BadRow(f"has {has}, but the corpus's first row {others}")
        if not self.has_roles:
            return ids[kept], None
        return ids[kept], _roles(ids, _numbers(row, LABELS), kept)[kept]


def _roles(ids: NDArray[Any], labels: NDArray[Any], kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Of each token; BadRow for labels that are not the ids' own."""
    if len(labels) != len(ids):
        raise BadRow(f"has {len(ids)} {IDS} and {len(labels)} {LABELS}: there has to be one of each for a token")
    trained = labels != IGNORED
    if (wrong := trained & ((labels != ids) | ~kept)).any():
        at = int(np.argmax(wrong))
        if not kept[at]:
            raise BadRow(f"has the label {labels[at]} in {LABELS!r}[{at}], which {MASK!r} says is padding")
        raise BadRow(
            f"has the label {labels[at]} in {LABELS!r}[{at}], but the token there is {ids[at]}: a label is its own"
            f" token, or {IGNORED}"
        )
    return np.where(trained, np.uint8(ASSISTANT), np.uint8(USER))


def _kept(row: dict[str, Any], count: int) -> NDArray[np.bool_]:
    """Which tokens are no padding."""
    if row.get(MASK) is None:
        return np.ones(count, bool)
    mask = _numbers(row, MASK)
    if len(mask) != count:
        raise BadRow(f"has {count} {IDS} and {len(mask)} numbers in {MASK!r}: there has to be one of each for a token")
    if not np.isin(mask, (0, 1)).all():
        raise BadRow(f"has {mask[~np.isin(mask, (0, 1))][0]} in {MASK!r}, which holds 0 for padding and else 1")
    return mask == 1


def _numbers(row: Any, key: str) -> NDArray[Any]:
    """A list of whole numbers under a key."""
    found = value(row, key)
    if not isinstance(found, list):
        raise BadRow(f"has {kind_of(found)} under {key!r}, but it has to be a list of whole numbers")
    try:
        numbers = np.asarray(found or np.empty(0, np.int64))
    except (ValueError, OverflowError):
        numbers = np.empty(0, object)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise BadRow(f"has something else than whole numbers in {key!r}")
    return numbers
