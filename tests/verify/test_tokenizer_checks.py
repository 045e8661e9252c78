"""The tokenizer's rows of the card."""

import io
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmpipe.verify.tokenizer import tokenizer_checks


@pytest.fixture(scope="module")
def model() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the quick brown fox {i} jumps over the lazy dog" for i in range(99)]), vocab_size=320,
        model_writer=written, model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture
def folders(tmp_path, model):
    for name in ("subject", "meta/7b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "subject" / "tokenizer.model").write_bytes(model)
    words = Tokenizer(models.WordLevel({"the": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "subject")
    (tmp_path / "subject" / "config.json").write_text('{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}')
    return tmp_path / "subject", tmp_path / "meta" / "7b"


def by_name(folders, rows=400):
    checks, first = tokenizer_checks(*folders, rows)
    return {check.name: check for check in checks}, first


@pytest.mark.parametrize("place", [".", ".."], ids=["beside the weights", "one folder above"])
def test_the_file_is_compared_byte_for_byte(folders, model, place):
    truth = folders[1] / place / "tokenizer.model"
    truth.write_bytes(model)
    assert by_name(folders)[0]["tokenizer file"].verdict == "pass"
    truth.write_bytes(model + b"\0")
    assert by_name(folders)[0]["tokenizer file"].verdict == "fail"


def test_a_tokenizer_that_was_left_behind_is_found(folders, model):
    shutil.move(folders[0] / "tokenizer.model", folders[1])
    checks, first = by_name(folders)
    assert checks["tokenizer file"].verdict == "fail"
    assert first == "tokenizer: tokenizer.model of the source is missing"


def test_tokens_without_a_row_are_counted(folders):
    check = by_name(folders, rows=300)[0]["tokens without an embedding row"]
    assert check.verdict == "fail" and check.value == sentencepiece_size(folders) - 300


def sentencepiece_size(folders):
    return sentencepiece.SentencePieceProcessor(model_file=str(folders[0] / "tokenizer.model")).get_piece_size()


def test_a_tokenizer_json_that_reads_otherwise_is_shown_with_its_text(folders):
    check = by_name(folders)[0]["texts tokenized differently"]
    assert check.verdict == "fail" and "'Hello world': transformers [1, 1], SentencePiece [" in check.detail


def test_a_source_without_tokenizer_is_not_judged(folders):
    assert by_name(folders)[0]["tokenizer file"].verdict == "not run"


def test_special_tokens_are_the_tokenizers(folders):
    assert by_name(folders)[0]["special tokens that differ"].verdict == "pass"
    (folders[0] / "config.json").write_text('{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 7}')
    check = by_name(folders)[0]["special tokens that differ"]
    assert (check.verdict, check.detail) == ("fail", "eos is 7, the tokenizer's is 2")
