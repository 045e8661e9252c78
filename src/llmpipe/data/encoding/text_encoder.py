"""Texts to tokens: the encoder of a corpus of the kind text."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.config import Corpus
from llmpipe.data.encoding.encoded import Encoded, Reject
from llmpipe.data.encoding.fast_encoder import FastEncoder
from llmpipe.data.encoding.texts import BadRows, Texts, are_plain, texts_of
from llmpipe.data.readers.block import Block
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError


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

    @property
    def is_compiled(self) -> bool:
        """Whether the work on JSON lines is all compiled, and Python's lock is free meanwhile."""
        plain = are_plain(self.keys, self.separator)
        return plain and self.fast is not None and not self.fast.looks_at_texts

    def encode(self, block: Block, dtype: np.dtype[Any]) -> Encoded:
        """The documents of a block, in tokens of this type."""
        tokens, sizes, bad = [np.empty(0, dtype)], [np.empty(0, np.int64)], BadRows()
        for texts, worse in texts_of(block, self.keys, self.separator):
            more, of_each = self._ids(texts)
            tokens.append(more.astype(dtype, copy=False))
            sizes.append(of_each)
            bad += worse
        every = np.concatenate(sizes)
        kept = every[every > 0]
        rejects = [Reject.of(block, number, error) for number, error in bad]
        return Encoded(np.concatenate(tokens), kept, rejects, block.path, block.read, len(every) - len(kept))

    def _ids(self, texts: Texts) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids of texts laid end to end, each between its marks, and how many each has."""
        bos, eod = [self.tokenizer.bos_id] * self.bos, [self.tokenizer.eos_id] * self.append_eod
        if self.fast:
            return self.fast.encode(texts, bos, eod)
        if not len(texts):  # a block inside of one long line has no row
            return np.empty(0, np.int32), np.empty(0, np.int64)
        found = [bos + ids + eod if ids else ids for ids in self.tokenizer.encode_batch(list(texts), 1)]
        sizes = np.fromiter(map(len, found), np.int64, len(found))
        return np.fromiter(chain.from_iterable(found), np.int32, int(sizes.sum())), sizes
