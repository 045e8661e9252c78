"""The tokenizer against sentencepiece's own answers."""

import json
from pathlib import Path

import pytest
import sentencepiece

from llmpipe.data.tokenizer import open_tokenizer
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
    by_directory, by_file = open_tokenizer(tokenizer_dir), open_tokenizer(tokenizer_dir / "tokenizer.model")
    assert by_directory.sha256 == by_file.sha256
    assert (by_file.vocab_size, by_file.bos_id, by_file.eos_id) == (400, 1, 2)


@pytest.mark.parametrize("text", HARD)
def test_encode_is_sentencepieces(tokenizer_dir: Path, text: str) -> None:
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    tokenizer = open_tokenizer(tokenizer_dir)
    assert tokenizer.encode(text) == truth.EncodeAsIds(text)
    assert tokenizer.encode_batch([text.encode(), b"x"], 2) == [truth.EncodeAsIds(text), truth.EncodeAsIds("x")]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_becomes_a_control_token(tokenizer_dir: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_dir)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("<s>hello</s>"))


@pytest.mark.parametrize(("config", "expected"), [(None, False), ({}, False), ({"add_bos_token": True}, True)])
def test_add_bos_is_the_configs(tokenizer_dir: Path, tmp_path: Path, config: dict | None, expected: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_tokenizer(tmp_path).add_bos is expected


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_tokenizer(path)
    return str(error.value)


def test_refusals(tmp_path: Path) -> None:
    wanted = "tokenizer.model (of SentencePiece or tiktoken), tekken.json or tokenizer.json"
    missing = f"the tokenizer {tmp_path}/none is missing: name a directory with {wanted}, or that file"
    assert refused(tmp_path / "none") == missing
    assert refused(tmp_path) == f"{tmp_path} has no tokenizer: llmpipe reads {wanted}"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert refused(tmp_path).startswith(f"{tmp_path}/tokenizer.json is not a tokenizer of the tokenizers library (")
    (tmp_path / "tokenizer.model").write_text("not one")
    assert refused(tmp_path).startswith(f"{tmp_path}/tokenizer.model is neither a SentencePiece model nor tiktoken's")


def test_an_empty_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"tokenizer\.model is empty: copy or download it again"):
        open_tokenizer(tmp_path)
