"""SentencePiece's tokenizer.model: the library's own answer is the truth (design decision 7)."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from llmpipe.data.tokenizers import beside
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError


class SentencePiece(Tokenizer):
    """Tokens that were added beside the model have ids by name, and no text gives them."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        self.model = _load(path)
        pieces = range(self.model.vocab_size())
        special = {self.model.id_to_piece(number): number for number in pieces if self.model.is_control(number)}
        special |= beside.added_tokens(path.parent)
        marks = {
            role: special.get(beside.mark(path.parent, role) or "", -1) if number < 0 else number
            for role, number in (("bos", self.model.bos_id()), ("eos", self.model.eos_id()))
        }
        super().__init__(path, len(pieces), special, marks["bos"], marks["eos"])

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_batch(self, texts: Sequence[bytes], threads: int) -> list[list[int]]:
        return self.model.encode(texts, num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([number for number in ids if number < self.model.vocab_size()])

    def _piece_id(self, name: str) -> int | None:
        number = self.model.piece_to_id(name)
        return None if number == self.model.unk_id() and name != self.model.id_to_piece(number) else number


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    content = path.read_bytes()
    if not content:  # SentencePiece takes it for a model without tokens
        raise UserError(f"{path} is empty: copy or download it again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(
            f"{path} is neither a SentencePiece model nor tiktoken's lines of token and rank: copy it again"
        ) from error
