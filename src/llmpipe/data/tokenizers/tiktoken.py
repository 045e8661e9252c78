"""Vocabularies of ranked bytes: tiktoken's own answer is the truth, for Llama 3's tokenizer.model and for tekken.json.

tiktoken is a dependency because it merges any ranks exactly, and seven times faster than a byte-level BPE of the
tokenizers library, for which merges would have to be guessed from the ranks.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import regex
import tiktoken

from llmpipe.data.tokenizers import beside, ranks
from llmpipe.data.tokenizers.base import Tokenizer

LONGEST_BLANK = 500_000
"""Characters: tiktoken's pattern overflows its stack at a million of white space in a row."""


class TikToken(Tokenizer):
    """Ids are ranks, counted from `first_id`; special tokens are ids alone, never searched for in a text."""

    def __init__(
        self,
        path: Path,
        kind: str,
        pattern: str,
        pieces: dict[bytes, int],
        special: dict[str, int],
        bos: str,
        eos: str,
        first_id: int = 0,
    ):
        self.kind, self.pattern, self.first_id, self.pieces = kind, pattern, first_id, pieces
        self.model = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=pieces, special_tokens={})
        size = max(first_id + len(pieces), 1 + max(special.values()))
        added = beside.added_tokens(path.parent)
        renamed = {*added.values()}
        special = {name: number for name, number in special.items() if number not in renamed} | added
        super().__init__(path, size, special, special.get(bos, -1), special.get(eos, -1))

    def encode(self, text: str) -> list[int]:
        found = self.model.encode_ordinary(text) if len(text) < LONGEST_BLANK else [*chain(*self._parts(text))]
        return [self.first_id + number for number in found] if self.first_id else found

    def encode_batch(self, texts: Sequence[bytes], threads: int) -> list[list[int]]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text.decode()), texts))

    def decode(self, ids: list[int]) -> str:
        numbers = [number - self.first_id for number in ids]
        return self.model.decode([number for number in numbers if 0 <= number < len(self.pieces)])

    def _piece_id(self, name: str) -> int | None:
        number = self.pieces.get(name.encode())
        return None if number is None else self.first_id + number

    def _parts(self, text: str) -> Iterator[list[int]]:
        """The ranks of a text, whose very long white space is split here and merged there."""
        while (blank := regex.search(rf"\s{{{LONGEST_BLANK},}}", text)) is not None:
            start = max(0, blank.start() - 1)  # punctuation takes the line ends after it
            found = regex.finditer(self.pattern, text[start : blank.end() + 1])
            words = [word for word in found if start + word.end() <= blank.end()]
            before = words.pop(0).end() if start < blank.start() else 0
            yield self.model.encode_ordinary(text[: start + before])
            yield from (self.model._encode_single_piece(word.group()) for word in words)
            text = text[start + (words[-1].end() if words else before) :]
        yield self.model.encode_ordinary(text)


def open_ranks(path: Path) -> TikToken:
    """Llama 3's tokenizer.model. What lies beside it names its special tokens, else they are as in Llama 3.1."""
    pieces, params = ranks.read_ranks(path), path.with_name("params.json")
    named = not params.is_file() or bool(beside.read(params).get("use_scaled_rope"))
    special = {name: len(pieces) + number for number, name in enumerate(ranks.special_tokens(named))}
    return TikToken(path, "tiktoken", ranks.PATTERN, pieces, special, ranks.BOS, ranks.EOS)
