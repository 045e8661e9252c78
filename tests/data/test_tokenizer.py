"""The tokenizer against sentencepiece's own answers."""

import json
from pathlib import Path

import pytest
import sentencepiece

from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import UserError

HARD = [
    "",
    " hello  two",
    "<s> text </s> <unk> <0x0A>",
    "tab\tnew\nline\r\n",
    "caf\u00e9 \u65e5\u672c \U0001f600",
    "a\0b",
]


def test_directory_and_file_give_the_same(tokenizer_dir: Path) -> None:
    by_directory, by_file = Tokenizer(tokenizer_dir), Tokenizer(tokenizer_dir / "tokenizer.model")
    assert by_directory.sha256 == by_file.sha256
    assert (by_file.vocab_size, by_file.bos_id, by_file.eos_id) == (400, 1, 2)


@pytest.mark.parametrize("text", HARD)
def test_encode_is_sentencepieces(tokenizer_dir: Path, text: str) -> None:
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    tokenizer = Tokenizer(tokenizer_dir)
    assert tokenizer.encode(text) == truth.EncodeAsIds(text)
    assert tokenizer.encode_batch([text.encode(), b"x"], 2) == [truth.EncodeAsIds(text), truth.EncodeAsIds("x")]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_becomes_a_control_token(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("<s>hello</s>"))


@pytest.mark.parametrize(("config", "expected"), [(None, False), ({}, False), ({"add_bos_token": True}, True)])
def test_add_bos_is_the_configs(tokenizer_dir: Path, tmp_path: Path, config: dict | None, expected: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).add_bos is expected


def test_refusals(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            Tokenizer(path)
        return str(error.value)

    wanted = "this version of llmpipe takes SentencePiece's tokenizer.model"
    assert message(tmp_path / "none") == f"the tokenizer {tmp_path}/none is missing: {wanted}, or a directory with one"
    assert message(tmp_path) == f"{tmp_path} has no tokenizer.model: {wanted}"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert message(tmp_path) == f"{tmp_path} has no tokenizer.model but tokenizer.json: {wanted}"
    assert message(tmp_path / "tokenizer.json") == f"{tmp_path}/tokenizer.json is another kind of tokenizer: {wanted}"
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format
    assert f"{tmp_path}/tokenizer.model is not a model of SentencePiece" in message(tmp_path)


def test_an_empty_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"tokenizer\.model is empty: copy or download it again"):
        Tokenizer(tmp_path)
