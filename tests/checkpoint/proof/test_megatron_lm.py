"""Megatron-LM: our files are those of its own converters; theirs, and its torch_dist, are read back to their source."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from originals import ROOT, flat, ident, state_dict
from originals import write as write_hf
from record import describe
from tiny import config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import megatron_lm_files as made
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.megatron.dialects import named
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.megatron.write import write
from llmpipe.checkpoint.mover import Mover
from llmpipe.families import FAMILIES
from llmpipe.layout import Stages
from llmpipe.parallel.processes import run_ranks

Case = dict[str, Any]
CASES = json.loads((ROOT / "docs/proof/megatron_lm.json").read_text())["cases"]
RANKS, DIST = [case for case in CASES if "files" in case], [case for case in CASES if "tensors" in case]
MISTRALS = [case for case in CASES if "config.json" in case]
NAMES = {"mcore": "mcore", "megatron": "legacy"}


def label(case: Case) -> str:
    return f"{case.get('saver', case['direction'])}-{ident(case)}"


def dialect_of(case: Case) -> str:
    return NAMES[case.get("saver") or case["direction"].split()[-1]]


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.get("dtype", "float32"))


def hf_tensors(case: Case) -> dict[str, torch.Tensor]:
    return state_dict(case["shape"], dtype_of(case))


def hf_source(case: Case, path: Path) -> HfSource:
    """The tiny checkpoint; of a Mistral with what config.json says of one."""
    write_hf(case["shape"], path, dtype_of(case), **case.get("config.json", {}))
    return HfSource(path)


def originals_files(case: Case, root: Path) -> Path:
    """Files made by the tests, whose tensors' digests are the original's, with the original's args."""
    kind = "local" if case.get("transformer_impl") == "local" and case["saver"] == "mcore" else dialect_of(case)
    each = 4 // case["pp"]
    stages = [[range(first, first + each)] for first in range(0, 4, each)]
    args = {name: value for name, value in case["args"].items() if value != "absent"} | {"vocab_size": 131}
    made.write(root, hf_tensors(case), config(case["shape"]), kind, case["tp"], stages, **args)
    assert listed(root) == case["files"]
    return root


def canonical(files: dict[str, Any]) -> dict[str, Any]:
    """The norms by the names of Transformer Engine's layers, which we write."""
    pairs = (
        (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
        (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    )
    for old, new in pairs:
        files = {file: {name.replace(old, new): entry for name, entry in held.items()} for file, held in files.items()}
    return files


def listed(root: Path) -> dict[str, Any]:
    """The tensors of each file of ours, or of the tests', as the record lists the original's."""
    found = {}
    for path in sorted(root.glob("iter_*/*/*.pt")):
        model = flat(torch.load(path, weights_only=False)["model"])
        held = {name: describe(value) for name, value in model.items() if isinstance(value, torch.Tensor)}
        found[str(path.relative_to(root))] = held
    return found


def assert_read_back(source: MegatronSource, case: Case) -> None:
    """Every tensor is the source's, bit for bit."""
    wanted = hf_tensors(case)
    assert len(source.keys()) == len(wanted)
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(source.read(key), wanted[FAMILIES["llama"].hf_name(key, source.shape)]), key


@pytest.mark.parametrize("case", RANKS, ids=label)
def test_we_write_what_the_original_writes(case: Case, tmp_path: Path) -> None:
    source, root = hf_source(case, tmp_path / "hf"), tmp_path / "root"
    root.mkdir()
    write(Mover(source), root, named(dialect_of(case)), case["tp"], Stages(case["pp"]))
    assert listed(root) == canonical(case["files"])
    assert (root / "latest_checkpointed_iteration.txt").read_text() == case["latest_checkpointed_iteration"]
    # What the original loses on the way is what the tiny checkpoints have of their own.
    said = vars(torch.load(next(root.glob("iter_*/*/*.pt")), weights_only=False)["args"])
    assert (said["rotary_base"], case["args"]["rotary_base"]) == (23000, 10000)
    for name in ("num_layers", "num_query_groups", "kv_channels", "ffn_hidden_size", "padded_vocab_size", "swiglu",
                 "norm_epsilon", "untie_embeddings_and_output_weights", "tensor_model_parallel_size"):  # fmt: skip
        assert said[name] == case["args"][name], name
    found = MegatronSource(root)
    family = "mistral" if source.shape.window else "llama"  # without a window there is no difference, and no word
    assert (found.shape, found.dialect.name) == (replace(source.shape, family=family), dialect_of(case))
    assert_read_back(found, case)


@pytest.mark.parametrize("case", RANKS, ids=label)
def test_we_read_what_the_original_writes(case: Case, tmp_path: Path) -> None:
    assert_read_back(MegatronSource(originals_files(case, tmp_path / "root")), case)


@pytest.mark.parametrize("case", MISTRALS, ids=label)
def test_what_the_original_loses_of_a_mistral(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Theta, and the window, for which its args have no word: warnings tell, and the shape says them."""
    assert (case["args"]["window_size"], case["args"]["rotary_base"]) == ("absent", 10000)
    root = originals_files(case, tmp_path / "root")
    meant = replace(hf_source(case, tmp_path / "hf").shape, max_positions=8192)
    assert MegatronSource(root).shape == replace(meant, family="llama", rope_theta=1e4, window=None)
    assert "does not say window: none taken" in caplog.text and "rope_theta 10000.0" in caplog.text
    found = MegatronSource(root, meant)
    assert found.shape == meant
    assert_read_back(found, case)


def save(path: Path, case: Case) -> None:
    """In four processes, the layers dealt to two, and what tensor parallelism splits to two."""
    kv_heads = config(case["shape"])["num_key_value_heads"]
    mesh = init_device_mesh("cpu", (2, 2))
    state = {}
    for name, tensor in made.stacked(hf_tensors(case), kv_heads, 4).items():
        split = 2 if "linear_proj" in name or "fc2" in name else 1 if tensor.ndim == 3 else 0
        whole = (tensor.ndim == 2 and name.startswith("decoder.")) or tensor.ndim == 1
        layers = Shard(0) if name.startswith("decoder.layers.") else Replicate()
        state[name] = distribute_tensor(tensor, mesh, [layers, Replicate() if whole else Shard(split)])
    dcp.save(state | {"rng_state/shard_0.0_1.1": [1, 2], "optimizer.state.exp_avg": torch.ones(3)}, checkpoint_id=path)
    dist.barrier()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", DIST, ids=label)
def test_we_read_torch_dist(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tensors are those of Megatron-LM's own save_checkpoint; torch's own writer puts them into files."""
    stacked = made.stacked(hf_tensors(case), config(case["shape"])["num_key_value_heads"], 4)
    assert {name: describe(tensor) for name, tensor in stacked.items()} == case["tensors"]
    folder = tmp_path / "root/iter_0000001"
    run_ranks(save, 4, folder, case)
    torch.save({"args": made.args_of(config(case["shape"]), 2, 2)}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(case["metadata.json"]))
    (tmp_path / "root/latest_checkpointed_iteration.txt").write_text(case["latest_checkpointed_iteration"])
    with caplog.at_level("INFO"):
        found = MegatronSource(tmp_path / "root")
    assert_read_back(found, case)
    assert "left alone, weights only are read: optimizer, rng_state" in caplog.text
    assert (found.dialect.name, found.shape.rope_theta, found.shape.vocab) == ("mcore", 23000.0, 131)
