"""Rank files against slices cut by hand."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meta_files import FFN, HEAD_DIM, HIDDEN, LAYERS, VOCAB
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint import manifest, rank_files
from llmpipe.checkpoint.convert import convert, merge, shard
from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.rank_files import RankFilesSource
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, named_size
from llmpipe.files import sha256
from llmpipe.layout import Stages

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(hf_llama: Path, tokenizer_model: Path, tmp_path: Path) -> Path:
    source = shutil.copytree(hf_llama, tmp_path / "source")
    shutil.copy(tokenizer_model, source)
    convert(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_tp2_pp2_holds_the_slices_cut_by_hand(checkpoint: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    shard(checkpoint, tmp_path / "ranks", 2, Stages(2))
    files = {(t, p): load_file(tmp_path / f"ranks/tp{t}-pp{p}.safetensors") for t in range(2) for p in range(2)}
    seen = 0
    for (t, p), found in files.items():
        expected = {}
        if p == 0:  # 509 rows: 255 and 254
            expected["embedding.weight"] = hf_tensors["model.embed_tokens.weight"][255 * t : 255 * t + 255]
        else:
            expected["head.weight"] = hf_tensors["lm_head.weight"][255 * t : 255 * t + 255]
            expected["norm.weight"] = hf_tensors["model.norm.weight"]
        for layer in (2 * p, 2 * p + 1):
            theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
            rows = slice(t * 16, t * 16 + 16)
            expected[ours + "attention_norm.weight"] = hf_tensors[theirs + "input_layernorm.weight"]
            expected[ours + "mlp_norm.weight"] = hf_tensors[theirs + "post_attention_layernorm.weight"]
            expected[ours + "attention.q.weight"] = hf_tensors[theirs + "self_attn.q_proj.weight"][rows]
            expected[ours + "attention.k.weight"] = hf_tensors[theirs + "self_attn.k_proj.weight"][4 * t : 4 * t + 4]
            expected[ours + "attention.v.weight"] = hf_tensors[theirs + "self_attn.v_proj.weight"][4 * t : 4 * t + 4]
            expected[ours + "attention.o.weight"] = hf_tensors[theirs + "self_attn.o_proj.weight"][:, rows]
            expected[ours + "mlp.gate.weight"] = hf_tensors[theirs + "mlp.gate_proj.weight"][24 * t : 24 * t + 24]
            expected[ours + "mlp.up.weight"] = hf_tensors[theirs + "mlp.up_proj.weight"][24 * t : 24 * t + 24]
            expected[ours + "mlp.down.weight"] = hf_tensors[theirs + "mlp.down_proj.weight"][:, 24 * t : 24 * t + 24]
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (t, p, key)
        seen += len(found)
    assert seen == 2 * len(hf_tensors)


def test_header_and_manifest_say_the_layout_and_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    made = shard(checkpoint, tmp_path / "ranks", 2, Stages(1))
    digest = manifest.read(checkpoint).digest
    with safe_open(tmp_path / "ranks/tp1-pp0.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "tp": "2", "pp": "1", "rank": "tp1-pp0", "checkpoint": digest, "format": "pt",
        }  # fmt: skip
    assert made == manifest.check(tmp_path / "ranks")
    assert (made.kind, made.source["checkpoint"]) == ("rank_files", digest)
    beside = {name for name in made.files if not name.startswith("tp")}
    carried = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert beside == {file.name for file in checkpoint.iterdir()} - {"model.safetensors", "manifest.json"} == carried
    assert all((tmp_path / "ranks" / name).read_bytes() == (checkpoint / name).read_bytes() for name in beside)


def test_kv_heads_fewer_than_tp_are_replicated(checkpoint: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    shard(checkpoint, tmp_path / "ranks", 8, Stages(1))  # 2 KV heads: ranks 0 to 3 hold the first, 4 to 7 the second
    for rank in range(8):
        found = load_file(tmp_path / f"ranks/tp{rank}-pp0.safetensors")
        first = 0 if rank < 4 else HEAD_DIM
        for ours, theirs in (("k", "k_proj"), ("v", "v_proj")):
            tensor = hf_tensors[f"model.layers.0.self_attn.{theirs}.weight"][first : first + HEAD_DIM]
            assert torch.equal(found[f"layers.0.attention.{ours}.weight"], tensor)
        rows = (64 * rank, min(64 * rank + 64, VOCAB))  # 509 rows: seven times 64, then 61
        assert torch.equal(found["head.weight"], hf_tensors["lm_head.weight"][rows[0] : rows[1]])


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1), (8, 4), (1, 4)])
def test_merge_gives_the_checkpoint_back_bit_for_bit(checkpoint: Path, tmp_path: Path, tp: int, pp: int) -> None:
    shard(checkpoint, tmp_path / "ranks", tp, Stages(pp))
    made = merge(tmp_path / "ranks", tmp_path / "merged")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(made.files) == set(manifest.read(checkpoint).files)
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )
    assert manifest.check(tmp_path / "merged").kind == "checkpoint"


def test_layout_to_layout_is_the_same_as_from_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    for first, second in (((2, 2), (4, 1)), ((8, 1), (2, 4))):
        there, through, direct = tmp_path / "there", tmp_path / "through", tmp_path / "direct"
        shard(checkpoint, there, first[0], Stages(first[1]))
        shard(there, through, second[0], Stages(second[1]))
        shard(checkpoint, direct, second[0], Stages(second[1]))
        assert manifest.read(through).files == manifest.read(direct).files
        assert manifest.read(through).source["checkpoint"] == manifest.read(checkpoint).digest


def test_slices_are_read_across_ranks(checkpoint: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    shard(checkpoint, tmp_path / "ranks", 4, Stages(2))
    source = open_source(tmp_path / "ranks")
    assert isinstance(source, RankFilesSource)
    down = hf_tensors["model.layers.3.mlp.down_proj.weight"]
    part = (slice(5, HIDDEN), slice(7, FFN - 2))
    assert torch.equal(source.read("layers.3.mlp.down.weight", part), down[part])
    k = hf_tensors["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(source.read("layers.1.attention.k.weight", (slice(2, 7), slice(0, 3))), k[2:7, 0:3])
    assert torch.equal(source.read("norm.weight"), hf_tensors["model.norm.weight"])
    assert source.dtype("norm.weight") == torch.float32


def test_vocabulary_smaller_than_the_ranks_can_share(tmp_path: Path) -> None:
    """9 rows over 8 ranks: 2, 2, 2, 2, 1 and three ranks without any."""
    config = LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=8,
        pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    shard(tmp_path / "checkpoint", tmp_path / "ranks", 8, Stages(1))
    assert load_file(tmp_path / "ranks/tp7-pp0.safetensors")["head.weight"].shape == (0, 16)
    head = load_file(tmp_path / "hf/model.safetensors")["lm_head.weight"]
    assert torch.equal(open_source(tmp_path / "ranks").read("head.weight"), head)


def test_ranks_that_each_write_their_own_make_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    shard(checkpoint, tmp_path / "ranks", 2, Stages(2))
    (tmp_path / "weights").mkdir()
    digest, hashes = manifest.read(checkpoint).digest, {}
    for t in range(2):
        for p in range(2):
            name = f"tp{t}-pp{p}.safetensors"
            tensors = load_file(tmp_path / "ranks" / name)
            # in the order of the file, which load_file does not keep
            order = sorted(tensors, key=lambda key: _offset(tmp_path / "ranks" / name, key))
            hashes[name] = rank_files.write_rank(
                tmp_path / "weights", 2, Stages(2), t, p, {key: tensors[key] for key in order}, {"checkpoint": digest}
            )
    made = rank_files.finish(tmp_path / "weights", checkpoint, "weights", {"checkpoint": digest, "steps": 3}, hashes)
    assert hashes["tp1-pp1.safetensors"] == sha256(tmp_path / "weights/tp1-pp1.safetensors")
    found = open_source(tmp_path / "weights")
    assert torch.equal(found.read("embedding.weight"), open_source(checkpoint).read("embedding.weight"))
    assert made.kind == "weights"
    assert rank_files.checkpoint_digest(tmp_path / "weights") == made.digest
    assert made.files["tokenizer.model"] == manifest.read(checkpoint).files["tokenizer.model"]


def test_config_says_the_type_that_a_run_left(checkpoint: Path, tmp_path: Path) -> None:
    """A float32 checkpoint trained in bf16: transformers loads the merged weights in the type of config.json."""
    (tmp_path / "weights").mkdir()
    source = open_source(checkpoint)
    tensors = {key: source.read(key).to(torch.bfloat16) for key in source.keys()}  # noqa: SIM118
    hashes = {"tp0-pp0.safetensors": rank_files.write_rank(tmp_path / "weights", 1, Stages(1), 0, 0, tensors, {})}
    rank_files.finish(tmp_path / "weights", checkpoint, "weights", {}, hashes)
    merge(tmp_path / "weights", tmp_path / "merged")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tensors["head.weight"])


def _offset(path: Path, key: str) -> int:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header[key]["data_offsets"][0]


def test_impossible_layouts_name_those_that_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape("tp 3 does not divide 8 query heads and 2 KV heads: tp has to be one of")
    ):
        shard(checkpoint, tmp_path / "ranks", 3, Stages(1))
    with pytest.raises(
        UserError, match=re.escape(f"pp 3 does not divide {LAYERS} layers: pp has to be one of [1, 2, 4]")
    ):
        shard(checkpoint, tmp_path / "ranks", 1, Stages(3))
    assert not (tmp_path / "ranks").exists()


def test_unfinished_checkpoint_is_not_sharded(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"{hf} has no manifest.json: it is not a finished output of llmpipe")
    ):
        shard(hf, tmp_path / "ranks", 2, Stages(1))
    assert not (tmp_path / "ranks").exists()


def test_rank_files_that_do_not_belong_together_are_named(checkpoint: Path, tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    shard(checkpoint, ranks, 2, Stages(2))
    other = ranks / "tp1-pp1.safetensors"
    tensors = load_file(other)
    del tensors["layers.3.mlp.up.weight"]
    save_file(tensors, other, {"tp": "2", "pp": "2"})
    with pytest.raises(
        UserError, match=re.escape(f"{other}: 1 tensors do not fit the model:\n  missing: layers.3.mlp.up")
    ):
        open_source(ranks)
    save_file(tensors, other, {"tp": "4", "pp": "1"})
    message = f"{other} is of tp4-pp1, but tp0-pp0.safetensors beside it is of tp2-pp2: shard the checkpoint again"
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(ranks)
    other.unlink()
    with pytest.raises(
        UserError, match=re.escape(f"{other} is missing: tp2-pp2 is 4 files: shard the checkpoint again")
    ):
        open_source(ranks)
    save_file(tensors, ranks / "tp0-pp0.safetensors")
    message = f"{ranks / 'tp0-pp0.safetensors'} does not say its layout in its header: shard the checkpoint again"
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(ranks)


def test_tied_embeddings_are_on_the_first_and_the_last_stage() -> None:
    shape = replace(named_size("llama2_7b"), tie_embeddings=True)
    keys = [FAMILIES["llama"].keys(shape, Stages(4), rank) for rank in range(4)]
    assert ["embedding.weight" in table for table in keys] == [True, False, False, True]
    assert not any("head.weight" in table for table in keys)
