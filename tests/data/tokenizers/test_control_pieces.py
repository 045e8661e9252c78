"""Control pieces against protobuf and sentencepiece itself."""

from pathlib import Path

import pytest
import sentencepiece
from data_help import train

from llmpipe.data.tokenizers.control_pieces import as_control


def test_only_the_types_of_these_pieces_change(tmp_path: Path) -> None:
    content = train(tmp_path / "tokenizer.model", 420, user_defined_symbols=["<a>", "x" * 200]).read_bytes()
    before = sentencepiece.SentencePieceProcessor(model_proto=content)
    numbers = {before.piece_to_id("<a>"), before.piece_to_id("x" * 200), 419}
    after = sentencepiece.SentencePieceProcessor(model_proto=as_control(content, numbers))
    assert {n for n in range(420) if after.is_control(n)} == {1, 2, *numbers}
    assert [after.id_to_piece(n) for n in range(420)] == [before.id_to_piece(n) for n in range(420)]
    assert [after.get_score(n) for n in range(420)] == [before.get_score(n) for n in range(420)]
    assert as_control(content, set()) == content


def test_fields_of_every_wire_type_stay() -> None:
    """protobuf.dev/programming-guides/encoding: a varint, 64 and 32 bits, a message."""
    first, second = b"\x0a\x03\x0a\x01a", b"\x0a\x03\x0a\x01b"
    others = b"\xc8\x01\x96\x01" + b"\xc9\x01" + bytes(8) + b"\xcd\x01" + bytes(4) + b"\x12\x02\x08\x07"
    assert as_control(first + others + second, {1}) == first + others + b"\x0a\x05\x0a\x01b\x18\x03"


@pytest.mark.parametrize(
    ("before", "after"),
    [  # the bytes that write the lengths of a message and of the text in it: seven bits each, the lowest first
        (b"\x7d" + b"\x0a\x7b" + b"a" * 123, b"\x7f" + b"\x0a\x7b" + b"a" * 123),
        (b"\x7e" + b"\x0a\x7c" + b"a" * 124, b"\x80\x01" + b"\x0a\x7c" + b"a" * 124),
        (b"\x83\x02" + b"\x0a\x80\x02" + b"a" * 256, b"\x85\x02" + b"\x0a\x80\x02" + b"a" * 256),
        (b"\xff\x7f" + b"\x0a\xfc\x7f" + b"a" * 16380, b"\x81\x80\x01" + b"\x0a\xfc\x7f" + b"a" * 16380),
    ],
)
def test_lengths_are_varints(before: bytes, after: bytes) -> None:
    assert as_control(b"\x0a" + before, {0}) == b"\x0a" + after + b"\x18\x03"
