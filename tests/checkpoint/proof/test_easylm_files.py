"""Our EasyLM files are those of EasyLM's own converter, byte for byte; its export and its trainer agree with ours."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import cases, ident, state_dict, write
from record import describe
from tiny import SHAPES

from easylm_files import easylm_tensors, write_nested, write_stream
from llmpipe.checkpoint import easylm
from llmpipe.checkpoint.easylm import EasyLMSource
from llmpipe.checkpoint.easylm_files import metadata_bytes
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.mover import Mover
from llmpipe.families import FAMILIES, Shape
from llmpipe.verify.compare import run
from llmpipe.verify.easylm import EasyLMModel

Case = dict[str, Any]


def shape_of(case: Case) -> Shape:
    num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn, vocab = SHAPES[case["shape"]]
    return Shape(
        family="llama", num_layers=num_layers, hidden=hidden, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, ffn=ffn, vocab=vocab, max_positions=256, norm_eps=3e-5, rope_theta=23000.0,
    )  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_easylm(case: Case, path: Path, streaming: bool = True) -> Path:
    """The original's file, packed by the tests' own means."""
    dtype = getattr(torch, case["dtype"])
    tensors = easylm_tensors({n: t.to(dtype) for n, t in state_dict(case["shape"]).items()}, SHAPES[case["shape"]][4])
    return (write_stream if streaming else write_nested)(path, tensors)


def check_weights(source: EasyLMSource, case: Case, dtype: torch.dtype) -> None:
    expected = state_dict(case["shape"])
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(source.read(key), expected[FAMILIES["llama"].hf_name(key, source.shape)].to(dtype)), key


@pytest.mark.parametrize("case", cases("easylm", "hf_to_easylm"), ids=ident)
def test_the_originals_file_is_read(case: Case, tmp_path: Path) -> None:
    path = as_easylm(case, tmp_path / "file", case["streaming"])
    assert sha256(path) == next(iter(case["whole_file"].values()))
    check_weights(EasyLMSource(path, shape_of(case)), case, getattr(torch, case["dtype"]))


@pytest.mark.parametrize("case", [c for c in cases("easylm", "hf_to_easylm") if c["streaming"]], ids=ident)
def test_our_file_is_the_originals(case: Case, tmp_path: Path) -> None:
    write(case["shape"], tmp_path / "hf")
    (tmp_path / "easylm").mkdir()
    dtype = getattr(torch, case["dtype"])
    hashes = easylm.write(Mover(HfSource(tmp_path / "hf")), tmp_path / "easylm", dtype)
    path = tmp_path / "easylm" / "streaming_params"
    assert [sha256(path), hashes[path.name]] == 2 * list(case["whole_file"].values())


@pytest.mark.parametrize("case", cases("easylm", "easylm_to_hf"), ids=ident)
def test_what_we_read_is_what_the_original_exports(case: Case, tmp_path: Path) -> None:
    """It writes fp16, whatever it reads."""
    path = as_easylm(case, tmp_path / "file", case["prefix"] == "params")
    source = EasyLMSource(Path(f"{case['prefix']}::{path}"), shape_of(case))
    found = {
        FAMILIES["llama"].hf_name(key, source.shape): describe(source.read(key).half())
        for key in source.keys()  # noqa: SIM118
    }
    assert found == case["files"]["model.safetensors"]
    config = case["config"]
    assert (config["rope_theta"], config["rms_norm_eps"]) == (source.shape.rope_theta, source.shape.norm_eps)


@pytest.mark.parametrize("case", cases("easylm", "train"), ids=ident)
def test_the_trainers_file_has_these_keys_and_says_this_shape(case: Case, tmp_path: Path) -> None:
    (entries,) = case["files"].values()
    tensors = easylm_tensors(state_dict(case["shape"]), SHAPES[case["shape"]][4])
    weights = {name.removeprefix("params/params/"): entry for name, entry in entries.items() if "params" in name}
    assert weights == {name: describe(tensor) for name, tensor in tensors.items()}
    others = {name: entry["dtype"] for name, entry in entries.items() if "params" not in name}
    assert others == {"step": "int32", "opt_state/1/0/count": "int32", "opt_state/1/2/count": "int32"}
    counts = {name: torch.tensor(0, dtype=torch.int32) for name in others}
    parts = [write_stream(tmp_path / "x", counts), write_stream(tmp_path / "y", tensors, "params/params/")]
    (tmp_path / "streaming_train_state").write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    (tmp_path / "metadata.pkl").write_bytes(pickle.dumps({"llama_config": case["metadata"]["llama_config"]}))
    source = EasyLMSource(tmp_path)
    assert source.shape == shape_of(case)
    check_weights(source, case, torch.float32)
    ours = pickle.loads(metadata_bytes(source.shape))
    assert sorted(ours) == case["metadata"]["keys"]
    assert ours["llama_config"].items() <= case["metadata"]["llama_config"].items()


@pytest.mark.parametrize("case", cases("easylm", "logits"), ids=ident)
def test_the_plain_forward_is_easylms_own_at_the_theta_that_it_takes(case: Case, tmp_path: Path) -> None:
    assert not case["rope_theta_is_heard"]  # the defect that easylm.py tells of
    heads, kv_heads = SHAPES[case["shape"]][2:4]
    expected, tokens = torch.tensor(case["logits"]), torch.tensor([[(7 * i + 3) % 131 for i in range(24)]])
    path, errors = as_easylm(case, tmp_path / "file"), []
    for theta in (case["rope_theta"], 23000.0):
        said = {"query heads": heads, "KV heads": kv_heads, "norm eps": 3e-5, "rope theta": theta}
        found = run(EasyLMModel(path, said=said), tokens, torch.arange(24)[None])[0, case["positions"]]
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    assert errors[0] < 1e-6 and errors[1] > 1e-4
