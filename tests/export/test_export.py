"""`llmpipe export` against transformers and Meta's names, its model card, what its command refuses."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import Target, shard
from llmpipe.cli import group
from llmpipe.errors import UserError
from llmpipe.export.export import export
from llmpipe.layout import Stages
from tiny_llama import make_checkpoint


def values(directory: Path) -> dict[str, float]:
    """What check.json says was measured."""
    rows = json.loads((directory / "check.json").read_text())["checks"]
    assert all(row["verdict"] == "pass" for row in rows)
    return {row["name"]: row["value"] for row in rows}


def test_transformers_gets_the_weights_and_the_tokenizer(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out)
    theirs, expected = AutoModelForCausalLM.from_pretrained(out), LlamaForCausalLM.from_pretrained(checkpoint)
    for name, parameter in expected.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name
    assert AutoTokenizer.from_pretrained(out).encode("Hello world")[0] == 1
    found = manifest.check(out)
    assert found.kind == "export" and found.source["digest"] == manifest.read(run / "weights").digest
    assert found.source["run"] == "my_run" and found.source["format"] == {"to": "hf"}
    measured = values(out)
    assert measured["largest logit difference"] <= 1e-5 and measured["prompts continued differently"] == 0
    texts = json.loads((out / "check.json").read_text())["texts"]
    assert len(texts) == 4 and texts[0].startswith("Hello world")


def test_meta_gets_the_weights_in_its_own_order(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """wq's rows: of each head, the first of one half, the first of the other, the second ... (rotary on neighbours)."""
    out = tmp_path / "out"
    export(run, out, Target("meta", tp=2))
    theirs = dict(LlamaForCausalLM.from_pretrained(checkpoint).named_parameters())
    shards = [torch.load(out / f"consolidated.0{rank}.pth", weights_only=True) for rank in range(2)]
    query = torch.cat([shard["layers.1.attention.wq.weight"] for shard in shards])
    halves = theirs["model.layers.1.self_attn.q_proj.weight"].view(4, 2, 4, 32)  # heads, halves, pairs, columns
    assert torch.equal(query, halves.transpose(1, 2).reshape(32, 32))
    down = torch.cat([shard["layers.0.feed_forward.w2.weight"] for shard in shards], 1)
    assert torch.equal(down, theirs["model.layers.0.mlp.down_proj.weight"])
    params = json.loads((out / "params.json").read_text())
    assert (params["dim"], params["n_layers"], params["n_kv_heads"], params["vocab_size"]) == (32, 2, 2, 384)
    assert manifest.check(out).source["format"] == {"to": "meta", "tp": 2}
    assert (out / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


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
                 "| checkpoint trained from | 0123 |", "AutoModelForCausalLM.from_pretrained("):  # fmt: skip
        assert text in card
    assert str(tmp_path) not in card


def test_a_checkpoints_card_says_where_it_is_from(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", Target("easylm"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\npipeline_tag") and "library_name" not in card  # no library of the hub's reads it
    assert f"| weights | {checkpoint} |" in card and "## Training" not in card
    assert "--load_checkpoint='params::PATH_OF_THIS_DIRECTORY/streaming_params'" in card


def test_the_stored_type_is_what_config_says(tmp_path: Path) -> None:
    """The run trained in bf16 from an fp32 checkpoint: config.json must not claim float32."""
    checkpoint = make_checkpoint(tmp_path / "bf16", torch.bfloat16)
    shard(checkpoint, tmp_path / "ranks", 1, Stages(1))
    config = json.loads((tmp_path / "ranks" / "config.json").read_text())
    (tmp_path / "ranks" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    export(tmp_path / "ranks", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_cast(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out, Target(dtype=torch.bfloat16))
    theirs, expected = AutoModelForCausalLM.from_pretrained(out), LlamaForCausalLM.from_pretrained(checkpoint)
    for name, parameter in expected.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter.to(torch.bfloat16)), name
    assert manifest.check(out).source["format"] == {"to": "hf", "dtype": "bfloat16"}


def test_an_unfinished_run(run: Path, tmp_path: Path) -> None:
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"has no run\.json: this run is not finished; run finetune to its end first"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--to easylm --tp 2", "--to easylm is not split: leave out --tp, or split the checkpoint with llmpipe shard"),
        ("--to meta --pp 2", "--to meta has no pipeline stages: leave out --pp, --vp and --pp-layers"),
        ("--dialect epf", "--dialect epf is one of --to megatron, not of --to hf: name the format, or leave it out"),
        ("--to meta --tp 3", "--tp 3: Meta's files share 2 KV heads"),
        ("--to megatron --dialect ali", "alibaba's Megatron-LLaMA has no 2 KV heads for 4 query heads"),
    ],
)
def test_options_that_do_not_fit_the_format(run: Path, tmp_path: Path, options: str, told: str) -> None:
    done = CliRunner().invoke(group, ["export", str(run), "--output", str(tmp_path / "out"), *options.split()])
    assert isinstance(done.exception, UserError) and told in str(done.exception)
    assert not (tmp_path / "out").exists()
