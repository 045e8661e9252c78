"""Adapters that resized the vocabulary, with a tokenizer.model of their own, as Chinese-LLaMA and -Alpaca have it.

Ids are SentencePiece's own and transformers', rows those of the adapter's file.
"""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from meta_files import HIDDEN, VOCAB
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as protobuf
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import Target, convert, plan_convert
from llmpipe.errors import UserError
from llmpipe.verify.gate import verify

TEXT = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏 def f(x): 天地"
Q = "model.layers.1.self_attn.q_proj"
MODEL: Any = protobuf.ModelProto  # type: ignore[attr-defined]
ROWS = "rows of the adapter without a token"


@pytest.fixture(scope="module")
def chinese(tokenizer_model: Path) -> bytes:
    """The base's tokenizer and the pieces of another of SentencePiece's, joined as Chinese-LLaMA's script does."""
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, TEXT[:24]] * 9), model_writer=other, vocab_size=48, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    whole = MODEL.FromString(tokenizer_model.read_bytes())
    known = {piece.piece for piece in whole.pieces}
    for piece in MODEL.FromString(other.getvalue()).pieces:
        if piece.piece not in known:
            whole.pieces.add(piece=piece.piece, score=0)
    return whole.SerializeToString()


@pytest.fixture
def rows(chinese: bytes) -> int:
    found = sentencepiece.SentencePieceProcessor(model_proto=chinese).vocab_size()
    assert found > VOCAB + 9
    return found


@pytest.fixture
def base(hf: Path, tokenizer_model: Path) -> Path:
    shutil.copy(tokenizer_model, hf / "tokenizer.model")
    return hf


def adapter(folder: Path, rows: int, tokenizer: bytes | None = None) -> Path:
    """The directory that PEFT's save_pretrained makes of LoRA on q, with embed_tokens and lm_head of so many rows."""
    generator = torch.Generator().manual_seed(3)
    sizes = {f"{Q}.lora_A": (4, HIDDEN), f"{Q}.lora_B": (HIDDEN, 4)}
    sizes |= {"model.embed_tokens": (rows, HIDDEN), "lm_head": (rows, HIDDEN)}
    held = {f"base_model.model.{n}.weight": torch.randn(size, generator=generator) / 8 for n, size in sizes.items()}
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(held, folder / "adapter_model.safetensors")
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def check(card: dict, name: str) -> dict:
    return next(check for check in card["checks"] if check["name"] == name)


@pytest.mark.parametrize("foreign", [None, Target("meta", tp=2), Target("megatron", tp=2)], ids=["hf", "meta", "mega"])
def test_the_adapters_tokenizer_is_carried(
    base: Path, chinese: bytes, rows: int, tmp_path: Path, foreign: Target | None
) -> None:
    if foreign:
        convert(base, tmp_path / "foreign", foreign)
    source, out = tmp_path / "foreign" if foreign else base, tmp_path / "out"
    path = adapter(tmp_path / "adapter", rows, chinese)
    convert(source, out, changes=Changes(path))
    truth, found = sentencepiece.SentencePieceProcessor(model_proto=chinese), AutoTokenizer.from_pretrained(out)
    assert (out / "tokenizer.model").read_bytes() == chinese and len(found) == rows
    assert found.encode(TEXT, add_special_tokens=False) == truth.encode(TEXT)
    assert max(truth.encode(TEXT)) >= VOCAB
    model = AutoModelForCausalLM.from_pretrained(out)
    own = load_file(path / "adapter_model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, own["base_model.model.model.embed_tokens.weight"])
    card = verify(out, source)
    assert card["verdict"] == "pass" and check(card, ROWS)["value"] == 0
    assert check(card, "tokenizer file")["value"] == 0
    assert {"adapter_config.json", "tokenizer.model"} <= manifest.read(out).source["adapter"]["files"].keys()


def test_files_of_the_bases_tokenizer_do_not_lie_beside_the_adapters(
    base: Path, chinese: bytes, rows: int, tmp_path: Path
) -> None:
    convert(base, tmp_path / "whole")  # with tokenizer.json and tokenizer_config.json
    (tmp_path / "whole/generation_config.json").write_text("{}")
    manifest.write(tmp_path / "whole", "checkpoint", {})
    convert(tmp_path / "whole", tmp_path / "out", changes=Changes(adapter(tmp_path / "adapter", rows, chinese)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == rows
    assert (tmp_path / "out/generation_config.json").is_file()
    assert verify(tmp_path / "out", tmp_path / "whole")["verdict"] == "pass"


def test_a_tokenizer_that_transformers_grew_is_carried(base: Path, tmp_path: Path) -> None:
    """As trainers save it beside an adapter: tokenizer.json with the added tokens, no tokenizer.model."""
    convert(base, tmp_path / "whole")
    grown, path = AutoTokenizer.from_pretrained(tmp_path / "whole"), adapter(tmp_path / "adapter", VOCAB + 2)
    grown.add_tokens(["<think>", "</think>"], special_tokens=True)
    grown.save_pretrained(path)
    assert not (path / "tokenizer.model").exists()
    convert(tmp_path / "whole", tmp_path / "out", changes=Changes(path, ("<tool>",)))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<think>def f(x):</think>" + TEXT
    assert found.encode(text) == grown.encode(text) and VOCAB + 1 in found.encode(text)
    assert found.convert_tokens_to_ids("<tool>") == VOCAB + 2
    assert verify(tmp_path / "out", tmp_path / "whole")["verdict"] == "pass"


def test_added_tokens_come_after_the_adapters(base: Path, chinese: bytes, rows: int, tmp_path: Path) -> None:
    changes = Changes(adapter(tmp_path / "adapter", rows, chinese), ("<|im_start|>", "<|im_end|>"))
    convert(base, tmp_path / "out", changes=changes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [rows, rows + 1]
    found = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"]
    own = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(found[:rows], own) and len(found) == rows + 2
    assert verify(tmp_path / "out", base)["verdict"] == "pass"


def test_alpacas_padding_of_added_tokens_json(base: Path, chinese: bytes, rows: int, tmp_path: Path) -> None:
    """Chinese-Alpaca's tokenizer.model has a token less than its embedding has rows; added_tokens.json has the last."""
    path = adapter(tmp_path / "adapter", rows + 1, chinese)
    (path / "added_tokens.json").write_text(json.dumps({"[PAD]": rows}))
    convert(base, tmp_path / "out", changes=Changes(path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("[PAD]", add_special_tokens=False) == [rows] and len(tokenizer) == rows + 1
    assert verify(tmp_path / "out", base)["verdict"] == "pass"


@pytest.mark.parametrize("target", [Target(), Target("megatron", tp=2)], ids=["hf", "megatron"])
@pytest.mark.parametrize("beside", [True, False])
def test_rows_without_a_token_fail_the_gate(
    base: Path, chinese: bytes, rows: int, tmp_path: Path, target: Target, beside: bool
) -> None:
    """What convert once did: the base's tokenizer in a checkpoint with the adapter's rows."""
    path, out = adapter(tmp_path / "adapter", rows, chinese), tmp_path / "out"
    convert(base, out, target, changes=Changes(path))
    assert verify(out, base)["verdict"] == "pass"
    source = manifest.read(out).source
    del source["adapter"]["files"]["tokenizer.model"]
    shutil.copy(base / "tokenizer.model", out / "tokenizer.model")
    (out / "tokenizer.json").unlink(missing_ok=True)
    if not beside:
        (path / "tokenizer.model").unlink()
    manifest.write(out, manifest.read(out).kind, source)
    failed = "tokenizer file 1" if beside else re.escape(f"{ROWS} {rows - VOCAB} (limit 0)")
    with pytest.raises(UserError, match=failed):
        verify(out, base)


def other_first(model: bytes) -> bytes:
    """As many tokens, two of the first in each other's place."""
    whole = MODEL.FromString(model)
    first, second = whole.pieces[300].piece, whole.pieces[301].piece
    whole.pieces[300].piece, whole.pieces[301].piece = second, first
    return whole.SerializeToString()


def test_a_tokenizer_that_does_not_fit_is_refused(
    base: Path, chinese: bytes, rows: int, tokenizer_model: Path, tmp_path: Path
) -> None:
    first = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).id_to_piece(300)
    cases = {
        "none": (None, f"{base / 'tokenizer.model'} has {VOCAB} tokens: put the tokenizer"),
        "smaller": (tokenizer_model.read_bytes(), f"smaller/tokenizer.model has {VOCAB} tokens: put the tokenizer"),
        "others": (other_first(chinese), f"the tokens of {base / 'tokenizer.model'}: {first!r} is 300 there and 301 "),
    }
    for name, (tokenizer, told) in cases.items():
        changes = Changes(adapter(tmp_path / name, rows, tokenizer))
        with pytest.raises(UserError, match=re.escape(told)):
            convert(base, tmp_path / "out", changes=changes)
        with pytest.raises(UserError, match=re.escape(told)):
            plan_convert(base, tmp_path / "out", changes=changes)
        assert not (tmp_path / "out").exists()


def test_a_base_with_the_adapters_tokenizer_needs_none_beside_the_adapter(
    base: Path, chinese: bytes, rows: int, tmp_path: Path
) -> None:
    (base / "tokenizer.model").write_bytes(chinese)
    convert(base, tmp_path / "out", changes=Changes(adapter(tmp_path / "adapter", rows)))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == chinese
    assert verify(tmp_path / "out", base)["verdict"] == "pass"


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_of_the_same_vocabulary_leaves_the_tokenizer(
    base: Path, tokenizer_model: Path, tmp_path: Path, own: bool
) -> None:
    path = adapter(tmp_path / "adapter", VOCAB, tokenizer_model.read_bytes() if own else None)
    convert(base, tmp_path / "out", changes=Changes(path))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    assert manifest.read(tmp_path / "out").source["adapter"]["files"].keys() == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    card = verify(tmp_path / "out", base)
    assert card["verdict"] == "pass" and ROWS not in {check["name"] for check in card["checks"]}


def test_more_tokens_than_rows_are_named(
    base: Path, chinese: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer that grew without the embedding: the base's is carried, and the warning says what to do."""
    convert(base, tmp_path / "out", changes=Changes(adapter(tmp_path / "adapter", VOCAB, chinese)))
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert any(f"the embedding has {VOCAB} rows: --add-token " in message for message in caplog.messages)
