"""A SentencePiece model some of whose pieces are made control pieces, which no text gives.

A model is a protobuf message (github.com/google/sentencepiece src/sentencepiece_model.proto): its first field,
repeated, is a piece, whose third is the type. sentencepiece's own Python description of it asks for one protobuf.
"""

_PIECE = 1 << 3 | 2  # field 1, a message
_CONTROL = bytes([3 << 3, 3])  # field 3: CONTROL; the last value of a field counts


def as_control(model: bytes, numbers: set[int]) -> bytes:
    """The model with these pieces as control pieces, byte for byte the same elsewhere."""
    parts, piece, at = [], 0, 0
    while at < len(model):
        start, (tag, body) = at, _number(model, at)
        end = body + {1: 8, 5: 4}.get(tag & 7, 0)
        if end == body:
            size, body = _number(model, body)
            end = body + size if tag & 7 == 2 else body
        changed = tag == _PIECE and piece in numbers
        parts.append(_message(tag, model[body:end] + _CONTROL) if changed else model[start:end])
        piece, at = piece + (tag == _PIECE), end
    return b"".join(parts)


def _message(tag: int, body: bytes) -> bytes:
    return _varint(tag) + _varint(len(body)) + body


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A varint, seven bits a byte from the lowest, and where it ends."""
    value = shift = 0
    while True:
        value, at, shift = value | (message[at] & 127) << shift, at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at


def _varint(value: int) -> bytes:
    more = []
    while value > 127:
        more.append(value & 127 | 128)
        value >>= 7
    return bytes([*more, value])
