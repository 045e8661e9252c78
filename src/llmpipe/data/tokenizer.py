"""A tokenizer of any kind, opened: what lies in a directory decides which library's answer is the truth.

In this order: tokenizer.model (SentencePiece's, or tiktoken's ranks), tekken.json, tokenizer.json.
"""

from pathlib import Path

from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.data.tokenizers.beside import JSON, MODEL, TEKKEN
from llmpipe.data.tokenizers.ranks import is_tiktoken
from llmpipe.errors import UserError

__all__ = ["Tokenizer", "find_tokenizer", "open_tokenizer"]

_WANTED = f"{MODEL} (of SentencePiece or tiktoken), {TEKKEN} or {JSON}"


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory, or of one file; UserError if there is none that llmpipe reads.

    Each library is imported when a tokenizer asks for it.
    """
    file = path if path.is_file() else find_tokenizer(path)
    if file is None:
        raise UserError(_missing(path))
    if file.suffix != ".json":
        return _model(file)
    if file.name.startswith("tekken"):  # published as tekken_240911.json too
        from llmpipe.data.tokenizers.tekken import open_tekken

        return open_tekken(file)
    from llmpipe.data.tokenizers.huggingface import HuggingFace

    return HuggingFace(file)


def _model(file: Path) -> Tokenizer:
    if is_tiktoken(file):
        from llmpipe.data.tokenizers.tiktoken import open_ranks

        return open_ranks(file)
    from llmpipe.data.tokenizers.sentencepiece import SentencePiece

    return SentencePiece(file)


def find_tokenizer(folder: Path) -> Path | None:
    """The file of a directory that decides the ids; None without one."""
    return next((folder / name for name in (MODEL, TEKKEN, JSON) if (folder / name).is_file()), None)


def _missing(folder: Path) -> str:
    if not folder.exists():
        return f"the tokenizer {folder} is missing: name a directory with {_WANTED}, or that file"
    return f"{folder} has no tokenizer: llmpipe reads {_WANTED}{_advice(folder)}"


def _advice(folder: Path) -> str:
    """What to do with files that say the tokens but not how a text is split."""
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return ""
    load = "from transformers import AutoTokenizer as T; T.from_pretrained('.').save_pretrained('.')"
    return f'; transformers makes a {JSON} of its vocab.json and merges.txt: run there python -c "{load}"'
