"""The tokenizer: SentencePiece itself, whose answer is the truth for a tokenizer.model (design decision 7)."""

import json
from pathlib import Path

import sentencepiece

from llmpipe.errors import UserError
from llmpipe.files import sha256

NAME = "tokenizer.model"


class Tokenizer:
    """Text to token ids and back. Text is data: `<s>` written in it stays text."""

    def __init__(self, path: Path):
        """`path` is a directory with a tokenizer.model, or that file; UserError for anything else."""
        self.path = path / NAME if path.is_dir() else path
        _check_kind(path, self.path)
        content = self.path.read_bytes()
        if not content:  # SentencePiece takes it for a model without tokens
            raise UserError(f"{self.path} is empty: copy or download it again")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(
                f"{self.path} is not a model of SentencePiece, which is what this version of llmpipe takes"
                " (Llama-3's tokenizer.model, for one, is tiktoken's)"
            ) from error
        self.vocab_size: int = self.model.vocab_size()
        self.bos_id: int = self.model.bos_id()
        """-1 where the model has none."""
        self.eos_id: int = self.model.eos_id()
        """-1 where the model has none."""
        self.sha256 = sha256(self.path)

    @property
    def add_bos(self) -> bool:
        """Whether documents start with BOS unless told otherwise: add_bos_token of tokenizer_config.json beside it."""
        config = self.path.with_name("tokenizer_config.json")
        return config.is_file() and bool(json.loads(config.read_text()).get("add_bos_token", False))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""
        return self.model.encode(text)

    def encode_batch(self, texts: list[bytes], threads: int) -> list[list[int]]:
        """The ids of many texts in valid UTF-8, which SentencePiece encodes in threads of its own."""
        return self.model.encode(texts, num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control tokens such as BOS give none."""
        return self.model.decode(ids)


def _check_kind(given: Path, model: Path) -> None:
    """UserError if there is no tokenizer.model, naming what is there instead."""
    wanted = "this version of llmpipe takes SentencePiece's tokenizer.model"
    if not given.exists():
        raise UserError(f"the tokenizer {given} is missing: {wanted}, or a directory with one")
    if given.is_dir() and not model.is_file():
        other = [name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json") if (given / name).is_file()]
        raise UserError(f"{given} has no {NAME}{f' but {other[0]}' if other else ''}: {wanted}")
    if model.suffix == ".json":
        raise UserError(f"{model} is another kind of tokenizer: {wanted}")
