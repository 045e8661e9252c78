"""The tokenizer's files: sentencepiece is the truth, transformers has to agree on the finished directory."""

import inspect
import json
import re
import shutil
import typing
from pathlib import Path

import pytest
import sentencepiece
from meta_files import VOCAB, write_meta
from transformers import AutoTokenizer

from llmpipe.checkpoint import tokenizer_files
from llmpipe.checkpoint.convert import convert
from llmpipe.errors import UserError

TEXTS = (*tokenizer_files.PROBES, *inspect.getsource(typing).split("\n\n\n"), "", " ", "\n", "x" * 3000)


@pytest.fixture
def truth(tokenizer_model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


def with_tokenizer(meta: Path, model: Path) -> Path:
    shutil.copy(model, meta / "tokenizer.model")
    return meta


def test_autotokenizer_on_the_checkpoint_is_sentencepiece(
    meta: Path, tokenizer_model: Path, tmp_path: Path, truth: sentencepiece.SentencePieceProcessor
) -> None:
    made = convert(with_tokenizer(meta, tokenizer_model), tmp_path / "out")
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} < set(made.files)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (VOCAB, 1, 2, 0)
    for text in TEXTS:
        expected = truth.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected], text  # BOS and no EOS, as Llama's published directories
        assert tokenizer.decode(expected) == truth.decode(expected), text


def test_config_says_llamas_rule_and_the_ids(meta: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    convert(with_tokenizer(meta, tokenizer_model), tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_metas_downloads_have_the_tokenizer_beside_the_model(meta: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_model, meta.parent / "tokenizer.model")
    convert(meta, tmp_path / "deep/out")
    assert (tmp_path / "deep/out/tokenizer.model").read_bytes() == tokenizer_model.read_bytes()


def test_tokenizer_larger_than_the_model_is_an_error(hf_tensors: dict, tokenizer_model: Path, tmp_path: Path) -> None:
    small = dict(hf_tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        small[name] = small[name][:500]
    meta = with_tokenizer(write_meta(tmp_path / "meta", small, 2), tokenizer_model)
    message = (
        f"tokenizer and model vocabulary mismatch: {meta / 'tokenizer.model'} has 509 tokens, but the embedding"
        f" in {meta} has 500 rows: use the tokenizer that belongs to these weights"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        convert(meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_json_alone_is_measured_too(hf: Path, meta: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    convert(with_tokenizer(meta, tokenizer_model), tmp_path / "made")
    tokenizer = json.loads((tmp_path / "made/tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][0] | {"id": VOCAB, "content": "<|extra|>"},
    ]
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = f"tokenizer and model vocabulary mismatch: {hf / 'tokenizer.json'} has 510 tokens, but the"
    with pytest.raises(UserError, match=re.escape(message)):
        convert(hf, tmp_path / "out")


def test_smaller_tokenizer_is_a_warning(
    hf_tensors: dict, tokenizer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = dict(hf_tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        large[name] = large[name].repeat(2, 1)[:512]
    meta = with_tokenizer(write_meta(tmp_path / "meta", large, 2), tokenizer_model)
    convert(meta, tmp_path / "out")
    assert f"{meta / 'tokenizer.model'} has 509 tokens, the embedding in {meta} 512 rows" in caplog.messages


def test_no_tokenizer_is_a_warning(meta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(meta, tmp_path / "out")
    warning = f"{meta} has no tokenizer.model and no tokenizer.json: the checkpoint has no tokenizer"
    assert warning in caplog.messages


def test_tokenizer_json_that_disagrees_names_the_text(
    hf: Path, meta: Path, tokenizer_model: Path, tmp_path: Path, truth: sentencepiece.SentencePieceProcessor
) -> None:
    convert(with_tokenizer(meta, tokenizer_model), tmp_path / "made")
    tokenizer = json.loads((tmp_path / "made/tokenizer.json").read_text())
    tokenizer["normalizer"] = None  # no dummy prefix, spaces stay spaces
    with_tokenizer(hf, tokenizer_model)
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    expected = truth.encode("Hello world")
    with pytest.raises(UserError) as error:
        convert(hf, tmp_path / "out")
    assert str(error.value).startswith(
        f"{hf / 'tokenizer.model'} and the tokenizer.json for it disagree on the text 'Hello world': {expected} and ["
    )
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_sentencepiece_are_refused_by_the_probe(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(inspect.getsource(typing))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "other"), vocab_size=VOCAB, model_type="unigram",
        byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    with_tokenizer(meta, tmp_path / "other.model")
    with pytest.raises(
        UserError, match=r"disagree on the text .*: llmpipe makes a tokenizer\.json of SentencePiece BPE with"
    ):
        convert(meta, tmp_path / "out")


def test_files_that_are_no_tokenizer_are_named(meta: Path, hf: Path, tmp_path: Path) -> None:
    (meta / "tokenizer.model").write_text("SQ== 0\nSg== 1\n")  # as Llama 3's
    with pytest.raises(
        UserError, match=re.escape(f"{meta / 'tokenizer.model'} is not a SentencePiece model: this version")
    ):
        convert(meta, tmp_path / "out")
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"tokenizer\.json is not a tokenizer of the tokenizers library \(.+\): copy or"
    ):
        convert(hf, tmp_path / "out")
