"""EasyLM's field grammar, by its TextProcessor: sentencepiece gives each field's ids, put together by hand."""

import base64
import struct
from pathlib import Path

import pytest
import sentencepiece

from llmpipe.data.encoding.fields import Field, encode, parse
from llmpipe.data.readers.block import BadRow
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError

ROW = {
    "question": "what",
    "prompt": "is it",
    "answer": "a list",
    "ids": base64.b64encode(struct.pack("<2i", 5, 300)).decode(),
}


def test_parsed() -> None:
    assert parse("[question+prompt],answer") == [
        Field(False, keys=("question", "prompt")),
        Field(True, keys=("answer",)),
    ]
    assert parse("<|bos|>,[<|13|>],{ids},a.b") == [
        Field(True, token="bos"), Field(False, token="13"), Field(True, base64_key="ids"), Field(True, keys=("a.b",))
    ]  # fmt: skip


@pytest.mark.parametrize("grammar", ["", "a,", "[a", "a+", "[a,b]", "<|pad|>", "{}", "{a+b}", "[]", "a b]"])
def test_no_grammar(grammar: str) -> None:
    with pytest.raises(
        UserError, match=r"fields is .*, but .* in it is no field: keys as in \[question\+prompt\],answer"
    ):
        parse(grammar)


def test_encoded(tokenizer_dir: Path) -> None:
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    ids, trained = encode(
        ROW, parse("<|bos|>,[question+prompt],answer,{ids},[<|7|>],<|eos|>"), open_tokenizer(tokenizer_dir)
    )
    question, answer = truth.EncodeAsIds("what is it"), truth.EncodeAsIds("a list")
    assert ids == [1, *question, *answer, 5, 300, 7, 2]
    assert trained == [True, *[False] * len(question), *[True] * (len(answer) + 2), False, True]


def test_bad_rows(tokenizer_dir: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_dir)
    for ids, message in [
        ("a", "has something else than int32 in base64 under 'ids'"),
        ("AAAA", "has something else than int32 in base64 under 'ids': buffer size must be a multiple"),
        (base64.b64encode(struct.pack("<i", 400)).decode(), "has the token 400 under 'ids', which there is not"),
        (7, "has a number under 'ids', but it has to be a text"),
    ]:
        with pytest.raises(BadRow, match=message):
            encode({"ids": ids}, parse("{ids}"), tokenizer)
    with pytest.raises(UserError, match=r"fields has <\|400\|>, but .* has no such token"):
        encode(ROW, parse("<|400|>"), tokenizer)
