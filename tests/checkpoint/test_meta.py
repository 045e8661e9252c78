"""Meta's files: written by a permutation of the tests' own, row by row; the rotary arithmetic is the judge."""

import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meta_files import FFN, HEADS, HIDDEN, interleave, write_meta
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llmpipe.checkpoint.convert import convert
from llmpipe.checkpoint.layouts import head_rows
from llmpipe.checkpoint.meta import MetaSource
from llmpipe.errors import UserError

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_convert_gives_back_the_tensors_of_transformers(hf_tensors: Tensors, tmp_path: Path, shards: int) -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in hf_tensors.items()}
    convert(write_meta(tmp_path / "meta", half, shards), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == half.keys()
    for name, tensor in half.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name


def test_transformers_computes_the_same_with_what_was_converted(meta: Path, hf_llama: Path, tmp_path: Path) -> None:
    convert(meta, tmp_path / "out")
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (hf_llama, tmp_path / "out"))
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_permute_keeps_attention_scores() -> None:
    """Meta turns neighbouring pairs as complex numbers, transformers turns halves: the scores must agree."""
    head_dim, length = 8, 5
    wq, wk, x = torch.randn(head_dim, 16), torch.randn(head_dim, 16), torch.randn(length, 16)
    angles = torch.outer(torch.arange(length).float(), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))

    def turned(w: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(length, head_dim // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    expected = turned(wq) @ turned(wk).T
    rows = torch.empty(head_dim, dtype=torch.long)  # the stored row of each of ours
    for part in head_rows("q", range(1), head_dim, 16, 0, interleaved=True):
        rows[part.rows] = torch.arange(part.rows.stop - part.rows.start) * part.step + part.at_row
    q, k = ((x @ w[rows].T)[None, None] for w in (wq, wk))
    whole = torch.cat([angles, angles], dim=-1)[None]
    q, k = apply_rotary_pos_emb(q, k, whole.cos(), whole.sin())
    torch.testing.assert_close((q @ k.transpose(-1, -2))[0, 0], expected)


def test_slices_are_of_the_half_split_tensor(meta: Path, hf_tensors: Tensors) -> None:
    source = MetaSource(meta)
    for key, name in (
        ("layers.1.attention.q.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("layers.1.attention.k.weight", "model.layers.1.self_attn.k_proj.weight"),
        ("layers.1.attention.o.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("layers.1.mlp.down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("layers.1.mlp.gate.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("embedding.weight", "model.embed_tokens.weight"),
    ):
        rows, columns = hf_tensors[name].shape
        part = (slice(rows // 4, rows - 1), slice(1, columns // 2 + 3))  # across the shards' border
        assert torch.equal(source.read(key, part), hf_tensors[name][part]), key
        assert torch.equal(source.read(key), hf_tensors[name]), key


def test_every_hyperparameter_is_carried(meta: Path, tmp_path: Path) -> None:
    shape = MetaSource(meta).shape
    assert (shape.num_layers, shape.hidden, shape.num_heads, shape.num_kv_heads) == (4, 32, 8, 2)
    assert (shape.ffn, shape.vocab, shape.norm_eps, shape.rope_theta) == (48, 509, 1e-5, 5e5)
    assert (shape.head_dim, shape.max_positions, shape.tie_embeddings) == (4, 4096, False)
    convert(meta, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert (config["vocab_size"], config["rms_norm_eps"], config["max_position_embeddings"]) == (509, 1e-5, 4096)


def test_longest_sequence_is_the_named_shapes_else_llama_2s(meta: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = MetaSource(meta).shape
    assert f"{meta}: params.json does not say the longest sequence: 4096, Llama 2's, taken" in caplog.messages
    assert MetaSource(meta, replace(found, max_positions=777)).shape.max_positions == 777
    with pytest.raises(UserError, match="not of the shape that was asked for: ffn is 48, expected 64: name the right"):
        MetaSource(meta, replace(found, ffn=64))


def test_llama_3_splits_the_embedding_by_rows(hf_tensors: Tensors, tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta", hf_tensors, 2, embedding_dim=0)
    source = MetaSource(meta)
    assert source.shape.vocab == 509
    assert torch.equal(source.read("embedding.weight"), hf_tensors["model.embed_tokens.weight"])


def test_heads_without_kv_heads_are_all_there(tmp_path: Path, hf_tensors: Tensors) -> None:
    """Llama 1 and 2 7B have no n_kv_heads: each query head has its own."""
    full = {name: torch.randn(HIDDEN, HIDDEN) if "k_proj" in name or "v_proj" in name else tensor
            for name, tensor in hf_tensors.items()}  # fmt: skip
    meta = write_meta(tmp_path / "meta", full, 2)
    for shard in range(2):  # write_meta permuted K with KV_HEADS heads
        path = meta / f"consolidated.{shard:02d}.pth"
        state = torch.load(path)
        for layer in range(4):
            k = interleave(full[f"model.layers.{layer}.self_attn.k_proj.weight"], HEADS)
            state[f"layers.{layer}.attention.wk.weight"] = k.chunk(2)[shard].clone()
        torch.save(state, path)
    params = json.loads((meta / "params.json").read_text())
    del params["n_kv_heads"], params["rope_theta"]
    (meta / "params.json").write_text(json.dumps(params))
    source = MetaSource(meta)
    assert (source.shape.num_kv_heads, source.shape.rope_theta) == (HEADS, 1e4)
    k = full["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(source.read("layers.2.attention.k.weight"), k)


def test_derived_buffer_is_named_in_the_log(meta: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    MetaSource(meta)
    assert f"{meta}: ignored, derived from params.json: rope.freqs" in caplog.messages


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mknod, (str(self.path),)


def test_pickle_that_would_run_code_is_refused_and_not_run(meta: Path, tmp_path: Path) -> None:
    path = meta / "consolidated.00.pth"
    torch.save({"tok_embeddings.weight": Malicious(tmp_path / "made")}, path)
    with pytest.raises(UserError) as error:
        MetaSource(meta)
    assert str(error.value).startswith(f"{path} is refused: it asks for posix.mknod and could run code when loaded")
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)  # the file is indeed malicious
    assert (tmp_path / "made").exists()


def test_bare_pickle_is_refused_and_not_run(meta: Path, tmp_path: Path) -> None:
    (meta / "consolidated.00.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    with pytest.raises(UserError, match=r"consolidated\.00\.pth is of torch 1\.5 or earlier, expected 1\.6 or later"):
        MetaSource(meta)
    assert not (tmp_path / "made").exists()


def test_truncated_pth_is_named(meta: Path) -> None:
    path = meta / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:5000])
    message = f"{path} is damaged (File is not a zip file): copy or download it again"
    with pytest.raises(UserError, match=re.escape(message)):
        MetaSource(meta)


def test_other_zips_and_tables_are_refused(meta: Path) -> None:
    path = meta / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other", "file")
    with pytest.raises(UserError, match=re.escape(f"{path} is a zip but no file of torch.save: data.pkl is missing")):
        MetaSource(meta)
    torch.save({"args": {"a": 1}}, path)
    with pytest.raises(UserError, match=re.escape(f"{path} holds no table of tensors: use Meta's own file")):
        MetaSource(meta)
    torch.save({"args": Namespace(a=1)}, path)
    with pytest.raises(UserError, match=re.escape(f"{path} holds no table of tensors: use Meta's own file")):
        MetaSource(meta)


def change(meta: Path, shard: int, **tensors: torch.Tensor | None) -> None:
    path = meta / f"consolidated.{shard:02d}.pth"
    state = torch.load(path) | tensors
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_missing_shard_is_named(meta: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(
        UserError, match=r"consolidated\.00\.pth is missing beside consolidated\.01\.pth: copy or download"
    ):
        MetaSource(meta)
    (meta / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated\.00\.pth is missing beside params\.json: copy or download all"):
        MetaSource(meta)
    short = write_meta(tmp_path / "short", hf_tensors, 2)
    (short / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"wrong shape: tok_embeddings\.weight is \[509, 16\], expected \[509, 32\]"):
        MetaSource(short)


def test_missing_and_left_over_tensors_are_listed(meta: Path) -> None:
    for shard in range(2):
        change(meta, shard, **{"layers.2.attention.wo.weight": None, "layers.2.attention.wo.bias": torch.ones(2)})
    with pytest.raises(UserError) as error:
        MetaSource(meta)
    assert str(error.value) == (
        f"{meta}: 2 tensors do not fit the model:\n  missing: layers.2.attention.wo.weight\n"
        "  left over: layers.2.attention.wo.bias"
    )
    for shard in range(2):
        change(meta, shard, **{"tok_embeddings.weight": None})
    with pytest.raises(UserError, match=r"the tensor tok_embeddings\.weight is missing: copy or download the weights"):
        MetaSource(meta)


def test_shards_that_do_not_belong_together_are_named(meta: Path) -> None:
    change(meta, 1, **{"norm.weight": torch.zeros(HIDDEN)})
    with pytest.raises(UserError, match=re.escape(f"{meta}: norm.weight is not the same in all shards: they are not")):
        MetaSource(meta)
    change(meta, 1, **{"layers.0.feed_forward.w1.weight": torch.zeros(FFN // 2, 5)})
    with pytest.raises(
        UserError, match=r"pieces of layers\.0\.feed_forward\.w1\.weight do not fit each other: \[\(24, 32"
    ):
        MetaSource(meta)
    change(meta, 1, **{"norm.weight": None})
    message = "consolidated.00.pth and consolidated.01.pth do not hold the same tensors: norm.weight: copy or download"
    with pytest.raises(UserError, match=re.escape(message)):
        MetaSource(meta)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("rope_scaling", 2, "the key rope_scaling is unknown and would be lost: did you mean 'rope_scaling_factor'?"),
    ("norm_eps", None, "the key norm_eps is missing: copy or download it again"),
    ("vocab_size", 512, "params.json says vocab_size 512, but tok_embeddings has 509 rows"),
    ("n_layers", 5, "missing: layers.4.attention_norm.weight"),
    ("n_kv_heads", 4, "wrong shape: layers.0.attention.wk.weight is [8, 32], expected [16, 32]"),
])  # fmt: skip
def test_params_that_do_not_fit_are_named(meta: Path, key: str, value: object, message: str) -> None:
    params = json.loads((meta / "params.json").read_text()) | {key: value}
    (meta / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    with pytest.raises(UserError, match=re.escape(message)):
        MetaSource(meta)


def test_a_flipped_bit_of_a_weight_is_found_by_the_files_own_checksums(meta: Path, tmp_path: Path) -> None:
    path = meta / "consolidated.01.pth"
    wq = torch.load(path)["layers.1.attention.wq.weight"]
    data = bytearray(path.read_bytes())
    at = data.index(wq.numpy().tobytes()) + 100
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"consolidated\.01\.pth"):
        convert(meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()
