"""The compiled encoder behind a gate: a tokenizer's own library says, again and again, whether its ids are right.

Before the first text the encoder proves itself on PROBES, and during a run on a thousandth of the corpus, in whole
documents spread over it. Ids that differ stop the run. A text that only the library may encode goes to the library.
"""

import logging
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.encoding.texts import Texts
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.data.tokenizers.compiled import Compiled, Unsupported, compiled
from llmpipe.errors import UserError

log = logging.getLogger(__name__)

CHECKED_SHARE, LONGEST_CHECKED = 1 / 1000, 1 << 16
"""Of the bytes of a corpus; bytes of a document."""
PROBES = (
    "", " ", "\n", "a", " hello  two   spaces ", "<s> </s> <unk> <0x0A> <|endoftext|> <|im_start|> [INST] [REF]",
    "tab\tline\r\n\r\n    indented\n\n  more\n" * 3, "it's IT'S we'Ve I'll o'\u017f 'd x'",
    "1 12 123 1234 12345 \u0663\u00bd\u2167", "\u2581 \u2581\u2581a \u2581b\u2581",
    "e\u0301 \u00e9 \u212b \ufb01 \uff21 \u0130\u01c5x HelloWorld ABCdef \u0301\u0301a", "\u00e9" * 5000, "ab" * 5000,
    "\u4e2d\u6587\uff0c\u65e5\u672c\u8a9e\ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d",
    "\U0001f469\u200d\U0001f469\u200d\U0001f466 \U0001f44d\U0001f3fd\ufe0f \U0001f1e8\U0001f1ed",
    "a\0b\x1c\x7f\x85\xa0\u200b\u2028\u3000\ufeff\ufffd",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # //to\n/*!?(--==*/",
    "x" * 300 + " " * 300 + "-" * 300 + "\n" * 300, "the quick brown fox jumps over the lazy dog" * 200,
)  # fmt: skip
"""Texts on which encoders are known to differ, and units longer than the encoder's window."""


def fast_encoder(tokenizer: Tokenizer) -> "FastEncoder | None":
    """The compiled encoder of a tokenizer, proven on PROBES; None, and a line in the log, if it is not for this one.

    UserError if their ids differ.
    """
    try:
        encoder = FastEncoder(tokenizer, compiled(tokenizer))
    except Unsupported as reason:
        log.info("texts are encoded by %s, not by llmpipe's faster encoder: %s", tokenizer.kind, reason)
        return None
    encoder.prove(PROBES)
    log.info("texts are encoded by llmpipe's own encoder, which %s checks on samples", tokenizer.kind)
    return encoder


class FastEncoder:
    """Encodes as the tokenizer does, or raises UserError; for any threads at once."""

    def __init__(self, tokenizer: Tokenizer, own: Compiled):
        self.tokenizer, self._own = tokenizer, own
        self._seen = self._checked = 0
        """Bytes."""
        self._counting = Lock()

    @property
    def looks_at_texts(self) -> bool:
        """Whether Python has to look at each text, to see whether the encoder may have it."""
        return bool(self._own.composed or self._own.found)

    def prove(self, texts: Sequence[str]) -> None:
        """UserError unless the ids of these texts are the library's."""
        encoded = Texts.of([text.encode() for text in texts])
        ids, sizes = self.encode(encoded, [], [])
        for text, found in zip(encoded, np.split(ids, np.cumsum(sizes)[:-1]), strict=True):
            self._check(text, found)

    def encode(self, texts: Texts, before: list[int], after: list[int]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids of texts laid end to end, and how many each has; UserError at a wrong one.

        `before` and `after` are ids around each text that has any.
        """
        marks = np.array(before, np.int32), np.array(after, np.int32)
        ids, sizes = self._own.encoder.encode(texts.content, texts.offsets, *marks)
        if others := self._for_the_library(texts, sizes):
            ids, sizes = self._with_the_librarys(texts, others, before, after, ids, sizes)
        for number in self._due(np.diff(texts.offsets)):
            if sizes[number]:
                end = sizes[: number + 1].sum()
                self._check(texts[number], ids[end - sizes[number] + len(before) : end - len(after)])
        return ids, sizes

    def _for_the_library(self, texts: Texts, sizes: NDArray[np.int64]) -> list[int]:
        """The texts of which the encoder is not sure, or that it may not encode."""
        unsure = np.flatnonzero(sizes < 0).tolist()
        if not self.looks_at_texts:
            return unsure
        return sorted({*unsure, *(number for number, text in enumerate(texts) if not self._is_plain(text))})

    def _is_plain(self, text: bytes) -> bool:
        if self._own.found and self._own.found.search(text):
            return False
        return not self._own.composed or text.isascii() or unicodedata.is_normalized("NFC", text.decode())

    def _with_the_librarys(
        self, texts: Texts, numbers: list[int], before: list[int], after: list[int], ids: NDArray[Any], sizes: Any
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids and sizes with those of the library in the place of some texts'."""
        found = np.split(ids, np.cumsum(np.maximum(sizes, 0))[:-1])
        for number in numbers:
            encoded = self.tokenizer.encode_batch([texts[number]], 1)[0]
            found[number] = np.array(before + encoded + after if encoded else [], ids.dtype)
        return np.concatenate(found), np.fromiter(map(len, found), np.int64, len(found))

    def _due(self, sizes: NDArray[np.int64]) -> list[int]:
        """The texts to check, by their sizes: the first, and each at which the share has fallen below its mark."""
        short, due, at = np.flatnonzero(sizes <= LONGEST_CHECKED), list[int](), 0
        with self._counting:
            marks = (self._seen + np.cumsum(sizes))[short] * CHECKED_SHARE
            while (at := max(at, int(np.searchsorted(marks, self._checked, "right")))) < len(short):
                self._checked += int(sizes[short[at]])
                due.append(int(short[at]))
                at += 1
            self._seen += int(sizes.sum())
        return due

    def _check(self, text: bytes, ids: NDArray[Any]) -> None:
        expected = self.tokenizer.encode_batch([text], 1)[0]
        if ids.tolist() == expected:
            return
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids.tolist(), expected, strict=False)))
        raise UserError(
            f"llmpipe's own encoder is wrong: from token {same + 1} on it has {ids[same : same + 8].tolist()} where"
            f" {self.tokenizer.kind} has {expected[same : same + 8]}; say --encoder reference, and please report this"
            f" text:\n{text.decode()!r}"
        )
