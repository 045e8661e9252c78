"""A grown vocabulary: the new ids are transformers's, the rows those of its own resizing with a mean by hand."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from meta_files import VOCAB
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_twins import theirs
from llmpipe.checkpoint import manifest, tokenizer_files
from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.grow import GrownSource, mean_row
from llmpipe.cli.convert import command
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError

TOKENS = ("<|im_start|>", "<|im_end|>", "<tool>")


@pytest.fixture
def source(hf: Path, tokenizer_model: Path) -> Path:
    shutil.copy(tokenizer_model, hf / "tokenizer.model")
    return hf


def grown(source: Path, output: Path, *tokens: str, new_rows: str = "mean") -> Path:
    convert(source, output, changes=Changes(None, tokens or TOKENS, new_rows))  # type: ignore[arg-type]
    return output


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("new_rows", ["mean", "zeros"])
def test_transformers_loads_the_rows_that_its_own_resizing_has(source: Path, tmp_path: Path, new_rows: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    expected = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected[name][VOCAB:] = before[name].double().mean(0) if new_rows == "mean" else 0
    found = AutoModelForCausalLM.from_pretrained(grown(source, tmp_path / "out", new_rows=new_rows))
    assert found.config.vocab_size == VOCAB + 3
    assert {name: tensor.shape for name, tensor in found.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_each_token_is_one_id_with_a_row_of_its_own(source: Path, tmp_path: Path) -> None:
    out = grown(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == VOCAB + 3
    for number, token in enumerate(TOKENS, VOCAB):
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
        assert tokenizer.encode(f"a{token}\nb", add_special_tokens=False).count(number) == 1
        assert tokenizer.decode([number]) == token and tokenizer.decode([number], skip_special_tokens=True) == ""
    assert json.loads((out / "added_tokens.json").read_text()) == {t: VOCAB + i for i, t in enumerate(TOKENS)}
    truth = tokenizer_files.load(source / "tokenizer.model")
    for text in tokenizer_files.PROBES:
        assert tokenizer.encode(text, add_special_tokens=False) == truth.encode(text)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_the_tokens_are_known_by_name_and_stay_text_in_text(source: Path, tmp_path: Path, kind: str) -> None:
    out, before = grown(source, tmp_path / "out"), open_tokenizer(source / "tokenizer.model")
    ours = open_tokenizer(out / kind)
    assert {token: ours.token_id(token) for token in TOKENS} == {t: VOCAB + i for i, t in enumerate(TOKENS)}
    assert ours.vocab_size == VOCAB + 3
    for text in (*TOKENS, f"x {TOKENS[0]}user\nhi{TOKENS[1]} {TOKENS[2]}{TOKENS[2]}"):
        assert ours.encode(text) == before.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_the_ids_are_those_of_transformers_own_add_tokens(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    ours = AutoTokenizer.from_pretrained(grown(source, tmp_path / "out"))
    for text in (*TOKENS, f"x {TOKENS[0]}user\nhi{TOKENS[1]} {TOKENS[2]}{TOKENS[2]}"):
        assert ours.encode(text) == tokenizer.encode(text)


def test_tokenizer_model_stays_and_the_manifest_says_what_was_added(source: Path, tmp_path: Path) -> None:
    out = grown(source, tmp_path / "out", new_rows="zeros")
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    made = manifest.check(out)
    assert (made.source["added_tokens"], made.source["new_rows"]) == (list(TOKENS), "zeros")


def test_a_token_that_is_there_is_not_added_twice(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = grown(source, tmp_path / "out", "<s>", "<tool>", "<tool>")
    assert "not added, there already: <s> (1)" in caplog.messages
    assert len(AutoTokenizer.from_pretrained(out)) == VOCAB + 1
    again = grown(out, tmp_path / "again", "<tool>", "<more>")
    assert open_source(again).shape.vocab == VOCAB + 2
    assert AutoTokenizer.from_pretrained(again).encode("<tool><more>", add_special_tokens=False) == [VOCAB, VOCAB + 1]
    unchanged = grown(out, tmp_path / "unchanged", "<tool>")
    assert weights(unchanged).keys() == weights(out).keys()
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(unchanged).items())


def test_rows_beyond_the_tokenizer_are_taken_first(
    hf_tensors: dict, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    larger = dict(hf_tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        larger[name] = torch.cat([larger[name], larger[name][:2]])
    save_file(larger, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": VOCAB + 2}
    (source / "config.json").write_text(json.dumps(config))
    out = grown(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(list(TOKENS)) == [VOCAB, VOCAB + 1, VOCAB + 2]
    found = weights(out)["lm_head.weight"]
    assert torch.equal(found[:-1], larger["lm_head.weight"]) and len(found) == VOCAB + 3
    told = f"{VOCAB + 2} rows, its tokenizer {VOCAB} tokens: 2 of the added tokens take rows as they are"
    assert any(message.endswith(told) for message in caplog.messages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_rounded_once_and_a_tied_head_stays_tied(tmp_path: Path, dtype: torch.dtype) -> None:
    model = theirs("qwen3", dtype=dtype)
    model.save_pretrained(tmp_path / "hf")
    source = GrownSource(open_source(tmp_path / "hf"), 104)
    embedding = model.state_dict()["model.embed_tokens.weight"]
    found = source.read("embedding.weight", (slice(99, 104), slice(3, 9)))
    assert torch.equal(found[:2], embedding[99:, 3:9])
    assert torch.equal(found[2:], embedding.double().mean(0).to(dtype)[3:9].expand(3, 6))
    assert "head.weight" not in source.keys()  # noqa: SIM118
    assert source.blocks("embedding.weight") is None and source.blocks("norm.weight")


def test_the_mean_over_many_windows(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_source(source)
    whole = mean_row(opened, "embedding.weight")
    monkeypatch.setattr("llmpipe.checkpoint.grow.CHUNK_BYTES", 4096)
    assert torch.allclose(mean_row(opened, "embedding.weight"), whole, rtol=1e-14, atol=0)


def test_what_cannot_grow_is_said(hf: Path, source: Path, meta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{meta} has no tokenizer that tokens could be added to")):
        grown(meta, tmp_path / "out")
    with pytest.raises(UserError, match="--add-token ' ' is no token"):
        grown(source, tmp_path / "out", " ")
    with pytest.raises(UserError, match="--to meta takes no --add-token: make a checkpoint first"):
        convert(source, tmp_path / "out", Target("meta"), changes=Changes(tokens=TOKENS))
    assert not (tmp_path / "out").exists()


def test_the_grown_checkpoint_goes_to_other_formats_with_its_tokens(source: Path, tmp_path: Path) -> None:
    out = grown(source, tmp_path / "out")
    convert(out, tmp_path / "megatron", Target("megatron", tp=2))
    convert(tmp_path / "megatron", tmp_path / "back")
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(tmp_path / "back").items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) == VOCAB + 3


def test_from_the_command_line(source: Path, tmp_path: Path) -> None:
    options = ["--add-token", "<a>", "--add-token", "<b>", "--new-rows", "zeros"]
    done = CliRunner().invoke(command, [str(source), "--output", str(tmp_path / "out"), *options, "--dry-run"])
    assert done.exit_code == 0 and f"vocab: {VOCAB + 2}" in done.output, done.output
    assert "computed: embedding.weight" in done.output
    done = CliRunner().invoke(command, [str(source), "--output", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert not weights(tmp_path / "out")["model.embed_tokens.weight"][VOCAB:].any()
