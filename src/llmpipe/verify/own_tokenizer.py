"""A source's own tokenizer: SentencePiece, tiktoken's algorithm, tekken or tokenizer.json; without convert's code."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex  # of transformers
import sentencepiece
from tokenizers import Tokenizer

from llmpipe.checkpoint.sentencepiece_model import read_spec
from llmpipe.errors import UserError

# github.com/meta-llama/llama3 llama/tokenizer.py.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = 256
_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Own:
    """What the source's own tokenizer says."""

    name: str
    size: int
    encode: Callable[[str], list[int]]
    """The ids of a text, BOS and EOS left out."""
    bos: int | None = None
    """None: the file does not say it."""
    eos: int | None = None
    inexact: str = ""
    """Why no tokenizer.json can be equal on every text."""
    excused: Callable[[str], bool] = lambda _: False
    """Whether that may show on a text."""


def read_own(place: Path) -> Own | None:
    """The tokenizer of a directory, tokenizer.model first; None without one."""
    model, given = place / "tokenizer.model", place / "tokenizer.json"
    if not model.is_file() and (place / "tekken.json").is_file():
        return _tekken(place / "tekken.json")
    if not model.is_file():
        return _library(given) if given.is_file() else None
    ranks = _ranks(model)
    if ranks is not None:
        size = len(ranks) + _SPECIAL
        return Own("tiktoken", size, lambda text: _merged(ranks, text, _WORDS), len(ranks), len(ranks) + 1)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{model} is no tokenizer of SentencePiece or tiktoken: copy it again") from error
    why, excused = _limits(model)
    size, bos, eos = pieces.get_piece_size(), pieces.bos_id(), pieces.eos_id()
    return Own("SentencePiece", size, pieces.encode, bos, eos, why, excused)


def _limits(model: Path) -> tuple[str, Callable[[str], bool]]:
    """Where transformers cannot answer as this SentencePiece model."""
    spec = read_spec(model)
    if spec.tied:
        return "pieces share scores, which tokenizer.json cannot say", lambda _: True
    if spec.charsmap:  # the tokenizers library normalizes a grapheme as one
        return "characters are normalized together with their marks", _has_marks
    return "", lambda _: False


def _has_marks(text: str) -> bool:
    return len(regex.findall(r"\X", text)) < len(text)


def _library(path: Path) -> Own:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path} is no tokenizer of the tokenizers library ({error}): copy it again") from error
    return Own(
        "its own tokenizer.json",
        tokenizer.get_vocab_size(),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def _tekken(path: Path) -> Own:
    """Mistral's: special tokens, then ranked bytes; BOS and EOS are the second and the third."""
    try:
        content = json.loads(path.read_text())
        config = content["config"]
        special, size, words = (config[key] for key in ("default_num_special_tokens", "default_vocab_size", "pattern"))
        tokens = content["vocab"][: size - special]
        ids = {base64.b64decode(token["token_bytes"]): special + token["rank"] for token in tokens}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer of Mistral ({error}): copy it again") from error
    return Own("tekken", size, lambda text: _merged(ids, text, words), 1, 2)


def _ranks(path: Path) -> dict[bytes, int] | None:
    """Lines of `base64 rank`; None if the file is of another kind."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs} or None
    except ValueError:
        return None


def _merged(ranks: dict[bytes, int], text: str, words: str) -> list[int]:
    """Byte pairs, the lowest rank first, in each word (github.com/openai/tiktoken, tiktoken/_educational.py)."""
    found: list[int] = []
    for word in regex.findall(words, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(a + b, _NEVER), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == _NEVER:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[part] for part in parts]
    return found
