"""A tokenizer's vocabulary and rules handed to the compiled encoder, for the kinds that it knows.

SentencePiece's BPE without a normalizer, tiktoken's ranks and byte-level BPE in tokenizer.json, the latter two behind
one of the split patterns below. Whether the ids are right is for `llmpipe.data.encoding.fast_encoder` to see.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from llmpipe import helpers
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.data.tokenizers.piece_spec import BPE, read_spec
from llmpipe.data.tokenizers.ranks import PATTERN

_BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
SPLITS = {
    PATTERN: "llama3",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    rf"|{_BLANK}": "qwen2",
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    rf"|{_BLANK}": "tekken",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
}
"""The encoder's names of the patterns of Llama 3, Qwen2 and later, tekken, and GPT-2."""


class Unsupported(Exception):
    """Why a tokenizer is not one for the compiled encoder."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """An encoder, and what has to be so with a text before it is given one."""

    encoder: helpers.Encoder
    composed: bool = False
    """Texts have to be in Unicode's normal form C, into which the tokenizer brings them."""
    found: re.Pattern[bytes] | None = None
    """Added tokens that the tokenizer finds in texts: a text may have none."""


def compiled(tokenizer: Tokenizer) -> Compiled:
    """The encoder of a tokenizer; Unsupported, with the reason, if it is of another kind."""
    known: dict[str, Callable[[Any], Compiled]] = {
        "sentencepiece": _pieces, "tiktoken": _ranks, "mistral-common": _ranks, "tokenizers": _byte_level,
    }  # fmt: skip
    try:
        return known[tokenizer.kind](tokenizer)
    except ValueError as error:  # the encoder's own
        raise Unsupported(str(error)) from error
    except KeyError as error:
        raise Unsupported(f"it lacks the token {error}") from error


def packed(texts: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Texts laid end to end, and where each starts and the last one ends."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=offsets[1:])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


def _pieces(tokenizer: Any) -> Compiled:
    model, spec = tokenizer.model, read_spec(tokenizer.path)
    numbers = range(model.vocab_size())
    reserved = {n for n in numbers if model.is_control(n) or model.is_unknown(n) or model.is_byte(n)}
    names = [model.id_to_piece(number) for number in numbers]
    for is_so, reason in (
        (spec.kind != BPE, "its model is not BPE"),
        (bool(spec.charsmap), "its model normalizes texts"),
        (not spec.space_mark, "its model writes spaces in a way of its own"),
        (spec.merge_spaces and "\u2581" in "".join(spec.own), "its model has spaces in pieces that a user defined"),
        (any(map(model.is_unused, numbers)), "its model has unused pieces"),
        (any(len(names[number]) == 1 for number in reserved), "a special token is one character"),
        (any(" " in name for name in names), "a piece has a space"),
    ):
        if is_so:
            raise Unsupported(reason)
    texts, offsets = packed([b"" if number in reserved else names[number].encode() for number in numbers])
    scores = _ordered(np.array([model.get_score(number) for number in numbers], np.float32))
    fallback = [model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)] if spec.byte_fallback else []
    if not all(map(model.is_byte, fallback)):
        raise Unsupported("its model lacks some of the 256 bytes")
    own = np.array([number for name in spec.own if (number := model.piece_to_id(name)) not in reserved], np.int32)
    rules = (spec.dummy_prefix, spec.merge_spaces, model.unk_id(), own, np.array(fallback, np.int32))
    return Compiled(helpers.piece_encoder(texts, offsets, scores, *rules))


def _ordered(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores that compare as the installed SentencePiece compares them: from 0.2.2 on -0.0 is less than 0.0.

    Both are there in a grown vocabulary: the first merge that was learnt has -0.0, and pieces put behind have 0.0.
    """
    version = tuple(map(int, sentencepiece.__version__.split(".")[:3]))
    if version < (0, 2, 2):
        return scores
    return np.where((scores == 0) & np.signbit(scores), np.nextafter(np.float32(0), np.float32(-1)), scores)


def _ranks(tokenizer: Any) -> Compiled:
    tokens = [b""] * (tokenizer.first_id + len(tokenizer.pieces))
    for token, rank in tokenizer.pieces.items():
        tokens[tokenizer.first_id + rank] = token
    return Compiled(helpers.byte_encoder(*packed(tokens), np.zeros(0, np.int32), True, _split(tokenizer.pattern)))


def _byte_level(tokenizer: Any) -> Compiled:
    content = json.loads(tokenizer.path.read_text())
    model, composed = content["model"], content["normalizer"] == {"type": "NFC"}
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    for is_so, reason in (
        (model["type"] != "BPE", f"its model is {model['type']}"),
        (content["normalizer"] is not None and not composed, "it normalizes texts"),
        (bool(model.get("dropout") or any(affixes) or model.get("byte_fallback")), "its BPE is of another kind"),
    ):
        if is_so:
            raise Unsupported(reason)
    vocab = model["vocab"]
    tokens = [b""] * (1 + max(vocab.values()))
    for name, number in vocab.items():
        tokens[number] = b"" if name in tokenizer.special else _bytes_of(name)
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merges = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs], np.int32).ravel()
    whole, split = bool(model.get("ignore_merges")), _split_of(content["pre_tokenizer"])
    added = [token["content"] for token in content["added_tokens"]]
    ordinary = [re.escape(name.encode()) for name in added if name not in tokenizer.special]
    found = re.compile(b"|".join(ordinary)) if ordinary else None
    return Compiled(helpers.byte_encoder(*packed(tokens), merges, whole, split), composed, found)


def _split_of(steps: dict[str, Any] | None) -> str:
    """The name of the split that a pre-tokenizer makes, before its bytes become characters."""
    steps = steps or {"type": "no pre-tokenizer"}
    parts = steps.get("pretokenizers", [steps])
    first, last = parts[0], parts[-1]
    if len(parts) > 2 or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise Unsupported(f"its text is split by {steps['type']}")
    if len(parts) == 1 and last["use_regex"]:
        return "gpt2"
    isolated = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if not isolated or last["use_regex"] or "Regex" not in first["pattern"]:
        raise Unsupported(f"its text is split by {first['type']}")
    return _split(first["pattern"]["Regex"])


def _split(pattern: str) -> str:
    if pattern not in SPLITS:
        raise Unsupported(f"its pattern is another: {pattern}")
    return SPLITS[pattern]


def _bytes_of(name: str) -> bytes:
    """A token's bytes, from the characters that stand for them (GPT-2's encoder.py); none if it has others."""
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return b""


def _bytes() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


_BYTES = _bytes()
