"""The tokenizer's rows of the card."""

import io
import json
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from twins import make_hf, make_meta

from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import convert
from llmpipe.verify.gate import verify
from llmpipe.verify.tokenizer import tokenizer_checks
from tekken_twin import write_tekken
from tiktoken_twin import write_tiktoken


@pytest.fixture(scope="module")
def model() -> bytes:
    """Spaces as they are and no normalizer, as Llama's."""
    return trained(normalization_rule_name="identity", remove_extra_whitespaces=False)


def trained(**changed):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the quick brown fox {i} jumps over the lazy dog" for i in range(99)]), vocab_size=320,
        model_writer=written, model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **changed,
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
    subject, reference = folders
    checks, first = tokenizer_checks(subject, reference, rows)
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


def test_a_source_without_tokenizer_is_not_judged_and_the_card_says_so(folders):
    check = by_name(folders)[0]["tokenizer file"]
    assert check.verdict == "not run" and check.detail.startswith("the source has no tokenizer: ")
    (folders[0] / "tokenizer.model").unlink()
    (folders[0] / "tokenizer.json").unlink()
    checks, first = by_name(folders)
    assert list(checks) == ["tokenizer file"] and first is None


def converted(tmp_path, write, vocab):
    """Meta's files with a vocabulary of that size and the tokenizer that `write` makes."""
    hf = make_hf(tmp_path / "twin")
    tensors = load_file(hf / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(vocab, tensors[name].shape[1])
    save_file(tensors, hf / "model.safetensors")
    source = make_meta(hf, tmp_path / "source")
    write(source / "tokenizer.model")
    return source


def test_sentencepiece_on_adversarial_texts(tmp_path, model):
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    source = converted(tmp_path, lambda path: path.write_bytes(model), vocab=size)
    convert(source, tmp_path / "out")
    checks, first = by_name((tmp_path / "out", source), rows=size)
    assert first is None and {check.verdict for check in checks.values()} == {"pass"}
    assert "AutoTokenizer and SentencePiece on 30 adv" in checks["texts tokenized differently"].detail


def test_what_transformers_cannot_normalize_alike_is_said_and_no_fault(tmp_path):
    source = converted(tmp_path, lambda path: path.write_bytes(trained()), vocab=320)
    convert(source, tmp_path / "out")
    checks, first = by_name((tmp_path / "out", source), rows=320)
    assert first is None and {check.verdict for check in checks.values()} == {"pass"}
    assert "1 more differ, characters are normalized together" in checks["texts tokenized differently"].detail


def test_tiktokens_model(tmp_path):
    source = converted(tmp_path, write_tiktoken, vocab=756)
    convert(source, tmp_path / "out")
    checks, first = by_name((tmp_path / "out", source), rows=756)
    assert first is None and {check.verdict for check in checks.values()} == {"pass"}
    assert checks["special tokens that differ"].detail == "bos 500, eos 501"
    assert "AutoTokenizer and tiktoken on " in checks["texts tokenized differently"].detail
    content = json.loads((tmp_path / "out/tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}+|\P{N}+"
    (tmp_path / "out/tokenizer.json").write_text(json.dumps(content))
    check = by_name((tmp_path / "out", source), rows=756)[0]["texts tokenized differently"]
    assert check.verdict == "fail" and "tiktoken [" in check.detail


def test_mistrals_tekken(tmp_path):
    source = converted(tmp_path, lambda path: write_tekken(path.with_name("tekken.json"), named=False), vocab=299)
    convert(source, tmp_path / "out")
    checks, first = by_name((tmp_path / "out", source), rows=299)
    assert first is None and {check.verdict for check in checks.values()} == {"pass"}
    assert checks["tokenizer file"].detail == "tekken.json is the source's, byte for byte"
    assert "AutoTokenizer and tekken on " in checks["texts tokenized differently"].detail
    content = json.loads((tmp_path / "out/tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}+|\P{N}+"
    (tmp_path / "out/tokenizer.json").write_text(json.dumps(content))
    check = by_name((tmp_path / "out", source), rows=299)[0]["texts tokenized differently"]
    assert check.verdict == "fail" and "tekken [" in check.detail
    (source / "tekken.json").write_text("[]")
    checks, first = by_name((tmp_path / "out", source), rows=299)
    assert "tekken.json is no tokenizer of Mistral" in checks["texts tokenized differently"].detail


def test_a_tokenizer_json_alone_and_added_tokens(tmp_path):
    convert(converted(tmp_path, write_tiktoken, vocab=760), tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").unlink()
    (tmp_path / "hf/manifest.json").unlink()
    tokens = ("<a>", "<b>", "<c>", "<d>", "<e>")
    convert(tmp_path / "hf", tmp_path / "out", changes=Changes(tokens=tokens))
    checks, first = by_name((tmp_path / "out", tmp_path / "hf"), rows=761)
    assert first is None and {check.verdict for check in checks.values()} == {"pass"}
    assert checks["tokenizer file"].detail == "tokenizer.json is the source's, but for 5 added tokens"
    assert checks["added tokens that are not one id"].detail == "<a> 756, <b> 757, <c> 758, <d> 759, <e> 760"
    assert by_name((tmp_path / "out", tmp_path / "hf"), rows=760)[0]["added tokens that are not one id"].value == 1
    content = json.loads((tmp_path / "out/tokenizer.json").read_text())
    content["added_tokens"].pop()
    (tmp_path / "out/tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "out/added_tokens.json").unlink()
    checks, first = by_name((tmp_path / "out", tmp_path / "hf"), rows=761)
    assert checks["added tokens that are not one id"].verdict == "fail" and "<e> is [" in str(first)


def test_a_grown_checkpoint_of_sentencepiece_passes_the_gate(tmp_path, model):
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    source = converted(tmp_path, lambda path: path.write_bytes(model), vocab=size)
    convert(source, tmp_path / "checkpoint", changes=Changes(tokens=("<|im_start|>", "<|im_end|>")))
    card = verify(tmp_path / "checkpoint", source)
    rows = {check["name"]: check for check in card["checks"]}
    assert card["verdict"] == "pass"
    told = f"<|im_start|> {size}, <|im_end|> {size + 1}"
    assert rows["added tokens that are not one id"]["detail"] == told


def test_special_tokens_are_the_tokenizers(folders):
    assert by_name(folders)[0]["special tokens that differ"].verdict == "pass"
    (folders[0] / "config.json").write_text('{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 7}')
    check = by_name(folders)[0]["special tokens that differ"]
    assert (check.verdict, check.detail) == ("fail", "eos is 7, the tokenizer's is 2")
