"""A tokenizer of any kind, opened: what lies in a directory decides which library's answer is the truth.

In this order: tokenizer.model (SentencePiece's, or tiktoken's ranks), tekken.json, tokenizer.json.
"""

from pathlib import Path

from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.data.tokenizers.beside import JSON, MODEL
from llmpipe.errors import UserError

__all__ = ["Tokenizer", "open_tokenizer"]

_WANTED = f"{MODEL} (of SentencePiece), {JSON}"


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory, or of one file; UserError if there is none that llmpipe reads."""
    file = path if path.is_file() else _file(path)
    if file.suffix == ".json":
        from llmpipe.data.tokenizers.huggingface import HuggingFace

        return HuggingFace(file)
    from llmpipe.data.tokenizers.sentencepiece import SentencePiece

    return SentencePiece(file)


def _file(folder: Path) -> Path:
    """The file of a directory that decides."""
    if not folder.exists():
        raise UserError(f"the tokenizer {folder} is missing: name a directory with {_WANTED}, or that file")
    found = next((folder / name for name in (MODEL, JSON) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no tokenizer: llmpipe reads {_WANTED}")
    return found
