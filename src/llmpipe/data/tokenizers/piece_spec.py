"""What a SentencePiece model says of itself beyond its pieces: the normalizer and the kind, read from its bytes.

A model is a protobuf message (github.com/google/sentencepiece src/sentencepiece_model.proto); sentencepiece's Python
class does not tell these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNIGRAM, BPE = 1, 2
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_NORMAL, _USER_DEFINED = 1, 4
_SIZES = {1: 8, 5: 4}  # bytes of a field, by its wire type


@dataclass(frozen=True, slots=True)
class Spec:
    """What a model says of itself beyond its pieces."""

    kind: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    """The normalizer's compiled table, as of nmt_nfkc; empty: identity."""
    dummy_prefix: bool = True
    merge_spaces: bool = True
    """Runs of spaces become one, those at the ends go."""
    space_mark: bool = True
    """Spaces are written as U+2581, and the dummy prefix goes before a text."""
    own: tuple[str, ...] = ()
    """User-defined pieces: found in a text before anything is merged."""
    tied: bool = False
    """Whether merged pieces share a score: SentencePiece then goes from left to right, which merges cannot say."""


def read_spec(model: Path) -> Spec:
    """The trainer's and the normalizer's settings of a model that SentencePiece has opened."""
    top = list(_fields(model.read_bytes()))
    trainer = dict(field for number, value in top if number == _TRAINER for field in _fields(value))
    normal = dict(field for number, value in top if number == _NORMALIZER for field in _fields(value))
    fallback, prefix, spaces = bool(trainer.get(35, 0)), bool(normal.get(3, 1)), bool(normal.get(4, 1))
    pieces = [dict(_fields(value)) for number, value in top if number == _PIECE]
    own = tuple(piece[1].decode() for piece in pieces if piece.get(3) == _USER_DEFINED)
    scores = [piece.get(2) for piece in pieces if piece.get(3, _NORMAL) == _NORMAL and len(piece[1].decode()) > 1]
    tied = trainer.get(3) == BPE and len(set(scores)) < len(scores)
    mark = bool(normal.get(5, 1)) and not trainer.get(24, 0)
    return Spec(trainer.get(3, UNIGRAM), fallback, normal.get(2, b""), prefix, spaces, mark, own, tied)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message's fields: whole numbers, and bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
            yield tag >> 3, value
            continue
        size = _SIZES.get(tag & 7)
        if size is None:
            size, at = varint(message, at)
        yield tag >> 3, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """A protobuf message's whole number, seven bits a byte from the lowest, and where it ends."""
    if (value := message[at]) < 128:  # nearly all
        return value, at + 1
    value = shift = 0
    while True:
        value, at, shift = value | (message[at] & 127) << shift, at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at
