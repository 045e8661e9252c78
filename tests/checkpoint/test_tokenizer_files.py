"""The tokenizer's files: sentencepiece is the truth, transformers has to agree on the finished directory."""

import inspect
import json
import re
import shutil
import struct
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
import torch
from meta_files import VOCAB, write_meta
from transformers import AutoTokenizer

from llmpipe.checkpoint import manifest, sentencepiece_model, tokenizer_files
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.formats import Told
from llmpipe.checkpoint.tiktoken_file import of_tekken
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.data.tokenizers.ranks import special_tokens
from llmpipe.data.tokenizers.tekken import open_tekken
from llmpipe.errors import UserError
from tekken_twin import IDS, write_tekken
from tiktoken_twin import encode as encode_tiktoken
from tiktoken_twin import write_tiktoken

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


def trained(folder: Path, **changed: Any) -> Path:
    """A SentencePiece model with other settings."""
    (folder / "text").write_text(inspect.getsource(typing))
    settings = {"vocab_size": VOCAB, "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    settings |= {"normalization_rule_name": "identity", "num_threads": 1, "minloglevel": 2} | changed
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "other"), **settings)
    return folder / "other.model"


KINDS = {
    "OpenLLaMA's, spaces merged": {"remove_extra_whitespaces": True},
    "normalized": {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    "no dummy prefix": {"add_dummy_prefix": False},
    "unigram": {"model_type": "unigram"},
    "unigram without bytes": {"model_type": "unigram", "byte_fallback": False},
    "user-defined pieces": {"user_defined_symbols": ["<ud>", "return", "ur"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sentencepiece_is_the_same_in_tokenizer_json(
    kind: str, meta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(tmp_path, **KINDS[kind])
    convert(with_tokenizer(meta, model), tmp_path / "out")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = tokenizer_files.PROBES if "unigram" in kind else TEXTS  # in long texts some splits are equally likely
    for text in (*texts, "a<ud>b <ud> return<ud>urn"):
        assert tokenizer.encode(text, add_special_tokens=False) == truth.encode(text), text
    assert any("unigram model" in message for message in caplog.messages) == ("unigram" in kind)


def test_what_tokenizer_json_cannot_say_is_refused(meta: Path, tmp_path: Path) -> None:
    """The tokenizers library normalizes a carriage return with its line feed as one."""
    with_tokenizer(meta, trained(tmp_path, normalization_rule_name="nmt_nfkc", byte_fallback=False))
    with pytest.raises(UserError, match=r"disagree on the text '\\n.*: a tokenizer\.json that came with the source"):
        convert(meta, tmp_path / "out")


def test_words_are_refused(meta: Path, tmp_path: Path) -> None:
    with_tokenizer(meta, trained(tmp_path, model_type="word", byte_fallback=False, hard_vocab_limit=False))
    with pytest.raises(UserError, match="one of words or characters: llmpipe reads SentencePiece BPE and unigram"):
        convert(meta, tmp_path / "out")


def extended(model: Path, pieces: list[str]) -> bytes:
    """The model with more pieces of score 0, as Chinese-LLaMA's: fields of protobuf, appended."""
    found = model.read_bytes()
    for piece in pieces:
        text = piece.encode()
        fields = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x01"
        found += b"\x0a" + bytes([len(fields)]) + fields
    return found


def test_extended_vocabularies_are_carried_with_a_warning(
    meta: Path, tokenizer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, hf_tensors: dict
) -> None:
    pieces = ["中", "文", "日", "本", "語", "中文", "文日", "日本", "本語", "文\uff0c", "\uff0c日", "\uff0c"]
    large = dict(hf_tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        large[name] = large[name].repeat(2, 1)[: VOCAB + len(pieces)]
    meta = write_meta(tmp_path / "zh", large, 2)
    (meta / "tokenizer.model").write_bytes(extended(tokenizer_model, pieces))
    convert(meta, tmp_path / "out")
    assert any("no tokenizer.json can say that" in message for message in caplog.messages)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()
    truth, tokenizer = tokenizer_files.load(meta / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = "中文 def f(x): 日本"
    assert tokenizer.encode(plain, add_special_tokens=False) == truth.encode(plain)


@pytest.fixture
def llama3(hf_tensors: dict, tmp_path: Path) -> tuple[Path, dict[bytes, int]]:
    """Meta's files with tiktoken's tokenizer.model beside the folder, and its ranks."""
    ranks = write_tiktoken(tmp_path / "tokenizer.model")
    rows = torch.randn(len(ranks) + 256, hf_tensors["lm_head.weight"].shape[1])
    tensors = hf_tensors | {"model.embed_tokens.weight": rows, "lm_head.weight": rows.flip(0)}
    return write_meta(tmp_path / "llama3", tensors, 2), ranks


def test_tiktokens_model_of_llama_3(llama3: tuple[Path, dict[bytes, int]], tmp_path: Path) -> None:
    """tiktoken 0.14 and transformers' TikTokenConverter gave the same ids on these texts and 170 more."""
    source, ranks = llama3
    made = convert(source, tmp_path / "out")
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} < set(made.files)
    tokenizer, bos = AutoTokenizer.from_pretrained(tmp_path / "out"), len(ranks)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos + 256, bos, bos + 1)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, bos + 1)
    for text in (*TEXTS, "İstanbul ǅ \u2019s 'S 'LL 1234567 \u2028\u00a0\u3000x"):
        expected = encode_tiktoken(ranks, text)
        assert tokenizer.encode(text) == [bos, *expected], text
        assert tokenizer.decode(expected) == text
    chat = "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    assert tokenizer.convert_tokens_to_ids([*chat]) == [bos, bos + 1, bos + 6, bos + 7, bos + 9]
    assert tokenizer.convert_tokens_to_ids("<|reserved_special_token_250|>") == bos + 255


def test_llama_3_1_named_more_special_tokens(tmp_path: Path) -> None:
    write_tiktoken(tmp_path / "tokenizer.model")
    ids = {token: special_tokens(named=True).index(token) for token in special_tokens(True)}
    names = (
        "<|finetune_right_pad_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_247|>",
    )
    assert [ids[name] for name in names] == [4, 8, 9, 10, 255]


def test_mistrals_tekken(hf_tensors: dict, tmp_path: Path) -> None:
    """The ids are mistral-common's."""
    write_tekken(tmp_path / "tekken.json", named=False)
    rows = torch.randn(299, hf_tensors["lm_head.weight"].shape[1])
    tensors = hf_tensors | {"model.embed_tokens.weight": rows, "lm_head.weight": rows.flip(0)}
    made = convert(write_meta(tmp_path / "mistral", tensors, 2), tmp_path / "out")
    assert {"tekken.json", "tokenizer.json", "tokenizer_config.json"} < set(made.files)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), open_tokenizer(tmp_path / "out")
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (299, 1, 2)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 299)
    plain = "\u2581 the\u00e9"
    assert [*theirs.encode(plain), 2] == IDS[plain]  # BOS and no EOS
    assert theirs.convert_tokens_to_ids(["[INST]", "[/INST]", "<SPECIAL_23>"]) == [3, 4, 23]
    for text in (text for text in TEXTS if "[INST]" not in text):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text


def test_a_tekken_with_a_special_name_as_text(tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken.json", named=False, more=("[INST]",))
    truth = open_tekken(tmp_path / "tekken.json")
    assert truth.encode("[INST]") != [truth.token_id("[INST]")] and truth.decode(truth.encode("[INST]")) == "[INST]"
    with pytest.raises(UserError) as error:
        of_tekken(truth)
    assert str(error.value) == (
        f"{tmp_path}/tekken.json has [INST] as a special token and as one of text, which no tokenizer.json can say: put"
        " the makers' tokenizer.json beside it"
    )


def test_names_of_control_pieces_are_text_to_sentencepiece(tmp_path: Path) -> None:
    """Mistral's v2 and later have them; transformers makes tokens of the names, which is not held against it."""
    (tmp_path / "text").write_text(inspect.getsource(typing))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        control_symbols=["[INST]", "[/INST]"],
    )  # fmt: skip
    model = tmp_path / "tokenizer.model"
    truth = tokenizer_files.load(model)
    made = sentencepiece_model.build(truth, model)
    assert any("[INST]" in text for text in tokenizer_files.PROBES)
    tokenizer_files.compare(truth.encode, made, model)
    assert made.encode("[INST]", add_special_tokens=False).ids == [truth.piece_to_id("[INST]")]


@pytest.mark.parametrize("kind", ["megatron", "easylm", "meta"])
def test_the_tokenizer_may_lie_in_the_folder_above(
    kind: Literal["megatron", "easylm", "meta"], hf: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "deep/weights"
    convert(hf, source, Target(kind))
    shutil.copy(tokenizer_model, source.parent / "tokenizer.model")
    (source.parent / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    made = convert(source, tmp_path / "out", told=Told(vocab=VOCAB) if kind == "megatron" else Told())
    assert {"tokenizer.model", "tokenizer.json", "special_tokens_map.json"} < set(made.files)
    manifest.check(tmp_path / "out")


def test_a_tokenizer_json_alone_is_carried(hf: Path, meta: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    convert(with_tokenizer(meta, tokenizer_model), tmp_path / "made")
    shutil.copy(tmp_path / "made/tokenizer.json", hf)
    convert(hf, tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "made"))
    assert all(ours.encode(text) == theirs.encode(text) for text in TEXTS)


def test_files_that_are_no_tokenizer_are_named(meta: Path, hf: Path, tmp_path: Path) -> None:
    (meta / "tokenizer.model").write_text("SQ== 0\nSg== 1\n")
    with pytest.raises(UserError, match=r"tokenizer\.model lacks tokens: its ranks have gaps, or not every byte"):
        convert(meta, tmp_path / "out")
    (meta / "tokenizer.model").write_text("SQ== 0\nSg 1\n")
    with pytest.raises(UserError, match=r"tokenizer\.model is no file of tiktoken \(.+\): copy or download"):
        convert(meta, tmp_path / "out")
    (meta / "tokenizer.model").write_text("not one\n")
    with pytest.raises(UserError, match=r"tokenizer\.model is neither a SentencePiece model nor tiktoken's lines"):
        convert(meta, tmp_path / "out")
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"tokenizer\.json is not a tokenizer of the tokenizers library \(.+\): copy or"
    ):
        convert(hf, tmp_path / "out")
