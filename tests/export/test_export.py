"""`llmpipe export` against transformers, and the last check firing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import shard
from llmpipe.errors import UserError
from llmpipe.export import check
from llmpipe.export import export as exporter
from llmpipe.export.export import export
from llmpipe.layout import Stages
from tiny_llama import make_checkpoint


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """A finished run's folder, which trained nothing."""
    shard(checkpoint, tmp_path / "run" / "weights", 2, Stages(2))
    record = {
        "name": "my_run", "steps": 7, "tokens": 1234567, "split": [8, 1, 1], "recipe": {"lr": 0.5},
        "data": [{"prefix": "corpora/text", "weight": 1.0, "digest": "abc"}],
        "model": {"path": "models/m/tp2-pp2", "checkpoint_digest": "0123"},
    }  # fmt: skip
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path / "run"


def test_transformers_gets_the_weights_and_the_tokenizer(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out)
    theirs, expected = AutoModelForCausalLM.from_pretrained(out), LlamaForCausalLM.from_pretrained(checkpoint)
    for name, parameter in expected.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name
    assert AutoTokenizer.from_pretrained(out).encode("Hello world")[0] == 1
    found = manifest.check(out)
    assert found.kind == "export" and found.source["digest"] == manifest.read(run / "weights").digest
    numbers = json.loads((out / "check.json").read_text())
    assert numbers["tensors"]["bit_equal"] == 21 and numbers["processes"] == {"tp": 2, "pp": 2}
    assert 0 < numbers["logits"]["max_abs_difference_at_most"] < numbers["logits"]["limit"]
    assert len(numbers["greedy"]["texts"]) == 4 and numbers["greedy"]["texts"][0].startswith("Hello world")


def test_exporting_twice_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "one").digest == export(run, tmp_path / "two").digest


def test_model_card(run: Path, tmp_path: Path) -> None:
    (run / "evaluate").mkdir()
    (run / "evaluate" / "table.md").write_text("# Evaluation of x\n\n| perplexity | 8.0 |\n")
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in ("# my_run", "Trained from models/m/tp2-pp2 for 7 steps, 1,234,567 tokens", "| text | 1 | abc |",
                 "| lr | 0.5 |", "## Evaluation\n\n| perplexity | 8.0 |", manifest.read(run / "weights").digest,
                 "| checkpoint trained from | 0123 |"):  # fmt: skip
        assert text in card


def test_the_stored_type_is_what_config_says(tmp_path: Path) -> None:
    """The run trained in bf16 from an fp32 checkpoint: config.json must not claim float32."""
    checkpoint = make_checkpoint(tmp_path / "bf16", torch.bfloat16)
    shard(checkpoint, tmp_path / "ranks", 1, Stages(1))
    config = json.loads((tmp_path / "ranks" / "config.json").read_text())
    (tmp_path / "ranks" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    export(tmp_path / "ranks", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def damage(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let a change be made to the written weights before the check."""
    write = exporter.hf.write

    def written(mover, directory, dtype):
        hashes = write(mover, directory, dtype)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors, directory)
        save_file(tensors, file, {"format": "pt"})
        return hashes

    monkeypatch.setattr(exporter.hf, "write", written)


def test_a_changed_bit_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(tensors: dict[str, torch.Tensor], _: Path) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32)[3, 5] ^= 1

    damage(monkeypatch, flip)
    with pytest.raises(
        UserError,
        match=r"the round trip differs: layers\.1\.mlp\.down\.weight is not that of .*run/weights; nothing was",
    ):
        export(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_other_logits_are_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are right but config.json is not: only running the model can tell."""

    def theta(_: object, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 2e4
        (directory / "config.json").write_text(json.dumps(config))

    damage(monkeypatch, theta)
    with pytest.raises(
        UserError, match=r"logits on the export differ from the trained model's by up to .* of the largest logit"
    ):
        export(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_too_little_memory_is_told_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpipe.export.check.available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"in fp32 and needs .* GiB of memory, 9\.31e-07 GiB are free: export on a"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowercase(_: object, directory: Path) -> None:
        path = directory / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["normalizer"]["normalizers"].append({"type": "Lowercase"})
        path.write_text(json.dumps(tokenizer))

    damage(monkeypatch, lowercase)
    with pytest.raises(
        UserError, match=r"transformers' tokenizer of the export gives .* for 'Hello world', SentencePiece"
    ):
        export(run, tmp_path / "out")


def answers(tokens: list[int], top: float) -> check.Answers:
    """Four prompts continued by `tokens`; the second step's logits are 1 for token 0 and `top` for token 1."""
    import numpy as np

    logits = np.array([[0.0, 1.0, 0.0], [1.0, top, 0.0]])
    return check.Answers(np.zeros(1), [tokens] * 4, [logits] * 4)


def test_greedy_text_that_parts_is_refused_unless_it_was_a_tie() -> None:
    ours = answers([1, 0], top=0.5)
    assert check.check_greedy(ours, answers([1, 0], 0.0)) == 0
    with pytest.raises(UserError) as raised:
        check.check_greedy(ours, answers([1, 1], 0.0))
    assert str(raised.value) == (
        "transformers on the export continues 'Hello world' with token 1 at step 2, the trained model with 0,"
        " 0.5 above it; nothing was exported"
    )
    assert check.check_greedy(answers([1, 0], top=0.99999), answers([1, 1], 0.0)) == 4


def test_an_unfinished_run(run: Path, tmp_path: Path) -> None:
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"has no run\.json: this run is not finished; run finetune to its end first"):
        export(run, tmp_path / "out")
