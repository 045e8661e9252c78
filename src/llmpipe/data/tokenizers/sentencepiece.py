"""SentencePiece's tokenizer.model: the library's own answer is the truth (design decision 7)."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from llmpipe.data.tokenizers import beside
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.data.tokenizers.control_pieces import as_control
from llmpipe.errors import UserError


class SentencePiece(Tokenizer):
    """Special are control pieces, pieces that the files beside call special, and tokens that were added to the model.

    No text gives them: of a user-defined piece among them, as `<|im_start|>` in Yi's, this is not what SentencePiece
    does by itself.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path):
        content = path.read_bytes()
        self.model = _load(path, content)
        size, special = self.model.vocab_size(), _special(path.parent, self.model)
        if found := {number for number in special.values() if number < size and not _is_hidden(self.model, number)}:
            self.model = _load(path, as_control(content, found))
        marks = {
            role: special.get(beside.mark(path.parent, role) or "", -1) if number < 0 else number
            for role, number in (("bos", self.model.bos_id()), ("eos", self.model.eos_id()))
        }
        super().__init__(path, size, special, marks["bos"], marks["eos"])

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_batch(self, texts: Sequence[bytes], threads: int) -> list[list[int]]:
        return self.model.encode(texts, num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([number for number in ids if number < self.model.vocab_size()])

    def _piece_id(self, name: str) -> int | None:
        number = self.model.piece_to_id(name)
        return None if number == self.model.unk_id() and name != self.model.id_to_piece(number) else number


def _load(path: Path, content: bytes) -> sentencepiece.SentencePieceProcessor:
    if not content:  # SentencePiece takes it for a model without tokens
        raise UserError(f"{path} is empty: copy or download it again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(
            f"{path} is neither a SentencePiece model nor tiktoken's lines of token and rank: copy it again"
        ) from error


def _special(folder: Path, model: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Ids by name. Files beside may repeat ordinary pieces among the added tokens."""
    size, names = model.vocab_size(), beside.special_names(folder)
    control = {model.id_to_piece(number): number for number in range(size) if model.is_control(number)}
    added = beside.added_tokens(folder)
    return control | {name: number for name, number in added.items() if number >= size or name in names}


def _is_hidden(model: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    """Whether a piece is never found in a text."""
    return model.is_control(number) or model.is_unknown(number)
