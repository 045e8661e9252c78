"""A SentencePiece model some of whose pieces are made control pieces, which no text gives.

A model is a protobuf message (github.com/google/sentencepiece src/sentencepiece_model.proto): its first field,
repeated, is a piece, whose third is the type. sentencepiece's own Python description of it asks for one protobuf.
"""

from llmpipe.data.tokenizers.piece_spec import varint

_PIECE = 1 << 3 | 2  # field 1, a message
_CONTROL = bytes([3 << 3, 3])  # field 3: CONTROL; the last value of a field counts


def as_control(model: bytes, numbers: set[int]) -> bytes:
    """The model with these pieces as control pieces, byte for byte the same elsewhere."""
    parts, piece, at = [], 0, 0
    while at < len(model):
        start, (tag, body) = at, varint(model, at)
        end = body + {1: 8, 5: 4}.get(tag & 7, 0)
        if end == body:
            size, body = varint(model, body)
            end = body + size if tag & 7 == 2 else body
        changed = tag == _PIECE and piece in numbers
        parts.append(_message(tag, model[body:end] + _CONTROL) if changed else model[start:end])
        piece, at = piece + (tag == _PIECE), end
    return b"".join(parts)


def _message(tag: int, body: bytes) -> bytes:
    return _written(tag) + _written(len(body)) + body


def _written(value: int) -> bytes:
    """A varint."""
    more = []
    while value > 127:
        more.append(value & 127 | 128)
        value >>= 7
    return bytes([*more, value])
