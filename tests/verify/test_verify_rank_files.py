"""Rank files, cut here by hand, against their checkpoint: each wrong byte, place and name is found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import HEAD_SIZE, KV_HEADS, LAYERS, VOCAB, make_hf, sign

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.layout import Stages
from llmpipe.verify.gate import verify
from llmpipe.verify.hf import HfModel
from llmpipe.verify.rank_files import Places

OURS = {"self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v",
        "self_attn.o_proj": "attention.o", "input_layernorm": "attention_norm", "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down", "post_attention_layernorm": "mlp_norm"}  # fmt: skip
TP = PP = 2


def make_rank_files(hf: Path, path: Path) -> Path:
    """Rank files of tp 2 x pp 2 by torch.chunk, which is what even sizes call for."""
    path.mkdir()
    files: dict[str, dict[str, torch.Tensor]] = {f"tp{t}-pp{p}": {} for t in range(TP) for p in range(PP)}
    for name, tensor in load_file(hf / "model.safetensors").items():
        base = name.removesuffix(".weight").removeprefix("model.")
        if base.startswith("layers."):
            _, number, kind = base.split(".", 2)
            key, stage = f"layers.{number}.{OURS[kind]}.weight", int(number) * PP // LAYERS
        else:
            key = {"embed_tokens": "embedding", "norm": "norm", "lm_head": "head"}[base] + ".weight"
            stage = 0 if base == "embed_tokens" else PP - 1
        cut = 1 if ".attention.o." in key or ".down." in key else 0
        parts = [tensor] * TP if "norm" in key else tensor.chunk(TP, cut)
        for rank, part in enumerate(parts):
            files[f"tp{rank}-pp{stage}"][key] = part.contiguous().clone()
    digest = manifest.read(hf).digest
    for file, tensors in files.items():
        save(path / f"{file}.safetensors", tensors, digest)
    for file in hf.glob("*.json"):
        if file.name != manifest.NAME:
            shutil.copy(file, path)
    sign(path, "rank_files", {"checkpoint": digest})
    return path


def save(file: Path, tensors: dict[str, torch.Tensor], digest: str) -> None:
    save_file(tensors, file, metadata={"tp": str(TP), "pp": str(PP), "checkpoint": digest, "format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rank_files")
    hf = make_hf(folder / "checkpoint", torch.bfloat16)
    return hf, make_rank_files(hf, folder / "tp2-pp2")


@pytest.fixture
def rank_files(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "tp2-pp2"))


def resign(rank_files: Path) -> None:
    sign(rank_files, "rank_files", manifest.read(rank_files).source)


def edit(rank_files: Path, name: str, change) -> None:
    """Alter one file's tensors, as a wrong `shard` would have, and sign the directory."""
    tensors = load_file(rank_files / name)
    change(tensors)
    save(rank_files / name, tensors, manifest.read(rank_files).source["checkpoint"])
    resign(rank_files)


def refused(rank_files: Path, checkpoint: Path) -> dict:
    with pytest.raises(UserError, match="Nothing may be trained from it"):
        verify(rank_files, checkpoint, rank_files.parent / "tp2-pp2.verify.json")
    assert not list(rank_files.parent.glob("*verify.json"))
    return json.loads((rank_files.parent / "tp2-pp2.verify.failed.json").read_text())


def test_right_rank_files_pass_in_their_own_processes(made, rank_files):
    card = verify(rank_files, made[0])
    assert (rank_files.parent / "tp2-pp2.verify.json").is_file()
    assert {check["verdict"] for check in card["checks"]} == {"pass"}
    logit = next(check for check in card["checks"] if check["name"] == "largest logit difference")
    assert 0 < logit["value"] < 1e-5  # another program's sums: close, not the same


def test_one_flipped_bit_is_found(made, rank_files):
    def flip(tensors):
        tensors["layers.2.mlp.gate.weight"].view(torch.int16)[5, 3] ^= 1

    edit(rank_files, "tp1-pp1.safetensors", flip)
    card = refused(rank_files, made[0])
    expected = "layers.2.mlp.gate.weight in tp1-pp1.safetensors differs in 1 of 3072 elements, first at [5, 3]"
    assert card["first_difference"] == expected
    assert next(check for check in card["checks"] if check["name"] == "forward in ranks")["verdict"] == "not run"


def test_a_sign_of_zero_is_a_difference(made, rank_files):
    def negative_zero(tensors):
        weight = tensors["embedding.weight"]
        weight[weight == 0] = -0.0

    edit(rank_files, "tp0-pp0.safetensors", negative_zero)
    assert "differs in 4 of 5120 elements, first at [3, 0]" in refused(rank_files, made[0])["first_difference"]


def test_two_swapped_ranks_are_found(made, rank_files):
    one, other = rank_files / "tp0-pp1.safetensors", rank_files / "tp1-pp1.safetensors"
    one.rename(rank_files / "aside")
    other.rename(one)
    (rank_files / "aside").rename(other)
    resign(rank_files)
    first = refused(rank_files, made[0])["first_difference"]
    assert first.startswith("layers.2.mlp.down.weight in tp0-pp1.safetensors differs in")


def test_a_missing_key_and_one_too_many_are_found(made, rank_files):
    edit(rank_files, "tp0-pp1.safetensors", lambda tensors: tensors.pop("norm.weight"))
    assert refused(rank_files, made[0])["first_difference"] == "norm.weight is missing in tp0-pp1.safetensors"
    edit(rank_files, "tp0-pp1.safetensors", lambda t: t.update({"norm.weight": load_file(
        made[1] / "tp0-pp1.safetensors")["norm.weight"], "extra.weight": torch.ones(2)}))  # fmt: skip
    first = refused(rank_files, made[0])["first_difference"]
    assert first == "extra.weight in tp0-pp1.safetensors is in no place of the checkpoint"


def test_a_missing_file_is_found(made, rank_files):
    (rank_files / "tp1-pp0.safetensors").unlink()
    resign(rank_files)
    assert refused(rank_files, made[0])["first_difference"] == "tp1-pp0.safetensors is missing"


def test_another_dtype_is_found(made, rank_files):
    edit(
        rank_files,
        "tp0-pp0.safetensors",
        lambda tensors: tensors.update({"embedding.weight": tensors["embedding.weight"].float()}),
    )
    assert (
        "embedding.weight in tp0-pp0.safetensors is torch.float32" in refused(rank_files, made[0])["first_difference"]
    )


def test_rank_files_of_another_checkpoint_are_found(made, rank_files):
    name = "tp1-pp1.safetensors"
    save(rank_files / name, load_file(rank_files / name), "0" * 64)
    resign(rank_files)
    assert (
        f"files of another checkpoint: {name} name another checkpoint"
        in refused(rank_files, made[0])["first_difference"]
    )


def test_another_config_beside_the_weights_is_found(made, rank_files):
    config = json.loads((rank_files / "config.json").read_text())
    (rank_files / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    resign(rank_files)
    assert "files beside the weights that differ: config.json" in refused(rank_files, made[0])["first_difference"]


def test_a_wrong_forward_in_ranks_is_found_although_the_bytes_are_right(made, rank_files, monkeypatch):
    """The engine's own mistake: here, one that a rank makes with its rotary table."""
    from llmpipe.model import decoder

    right = decoder.rope_table
    monkeypatch.setattr(decoder, "rope_table", lambda positions, *rest: right(positions + positions // 64, *rest))
    card = refused(rank_files, made[0])
    assert "in one process the same model agrees" in card["first_difference"]


def test_the_reference_has_to_be_a_checkpoint(rank_files):
    with pytest.raises(UserError, match="rank files are compared with the checkpoint they were cut from"):
        verify(rank_files, rank_files)


def test_fewer_kv_heads_than_ranks_are_replicated_and_uneven_vocabulary_ends_short(made):
    kv, places = torch.arange(KV_HEADS * HEAD_SIZE)[:, None], Places(4, Stages(), HfModel(made[0]))
    ranks = [places.part(kv, "attention.k", rank).flatten().tolist() for rank in range(4)]
    assert ranks == [list(range(8)), list(range(8)), list(range(8, 16)), list(range(8, 16))]
    rows = torch.arange(VOCAB + 1)[:, None]  # 161 in parts of 41
    assert [len(places.part(rows, "head", rank)) for rank in range(4)] == [41, 41, 41, 38]


def test_a_header_without_layout_is_refused(made, rank_files):
    name = "tp0-pp0.safetensors"
    save_file(load_file(rank_files / name), rank_files / name, metadata={"format": "pt"})
    resign(rank_files)
    with pytest.raises(UserError, match="does not say its layout, tp and pp, in its header's metadata"):
        verify(rank_files, made[0])


def test_where_it_does_not_fit_the_forward_is_left_out_and_the_card_says_so(made, rank_files, monkeypatch):
    monkeypatch.setattr("llmpipe.verify.rank_files.available_bytes", lambda: 1000)
    row = verify(rank_files, made[0])["checks"][-1]
    assert row["name"] == "forward in ranks" and row["verdict"] == "not run" and "GiB are needed" in row["detail"]
