"""What every kind of tokenizer offers to the rest of llmpipe."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpipe.data.tokenizers import beside
from llmpipe.errors import UserError, nearest


class Tokenizer(ABC):
    """Text to token ids and back. Text is data: `<s>` written in it stays text, whatever the kind."""

    kind: str
    """The library whose answer is the truth."""

    def __init__(self, path: Path, size: int, special: dict[str, int], bos_id: int, eos_id: int):
        """`size`: of the file `path` alone, without tokens added beside it; `special`: ids that no text gives."""
        self.path, self.special, self.bos_id, self.eos_id = path, special, bos_id, eos_id
        self.vocab_size = max(size, 1 + max(special.values(), default=-1))
        """Every id is below it."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes], threads: int) -> list[list[int]]:
        """The ids of many texts in valid UTF-8."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens such as BOS give none."""

    @abstractmethod
    def _piece_id(self, name: str) -> int | None:
        """The id of an ordinary piece of the vocabulary."""

    def token_id(self, name: str) -> int:
        """The id of a token by its name, as `<|im_start|>`; UserError if the vocabulary has none of it."""
        number = self.special.get(name, self._piece_id(name))
        if number is None:
            named = [token for token in self.special if not any(word in token for word in ("reserved", "SPECIAL_"))]
            raise UserError(f"{self.path} has no token {name!r}: {nearest(name, named)}")
        return number

    @cached_property
    def add_bos(self) -> bool:
        """Whether documents start with BOS unless told otherwise.

        add_bos_token of tokenizer_config.json says it; without it, what tokenizer.json adds to a text; else no.
        """
        told = beside.read(self.path.with_name(beside.CONFIG)).get("add_bos_token")
        return self.bos_id >= 0 and bool(self._json_adds_bos() if told is None else told)

    def _json_adds_bos(self) -> bool:
        processor = beside.head(self.path.with_name(beside.JSON)).get("post_processor")
        if processor is None:
            return False
        from llmpipe.data.tokenizers.huggingface import put_around  # here, because few tokenizers need it

        return put_around(processor)[:1] == [self.bos_id]

    @cached_property
    def files(self) -> dict[str, str]:
        """The SHA-256 of each file of this tokenizer, by name."""
        return beside.hashes(self.path)

    @property
    def sha256(self) -> str:
        """Of the file that decides the ids."""
        return self.files[self.path.name]

    def facts(self) -> dict[str, Any]:
        """What a dataset's manifest says of the tokenizer."""
        names = ("kind", "sha256", "files", "vocab_size", "bos_id", "eos_id")
        return {"path": str(self.path), **{name: getattr(self, name) for name in names}}
