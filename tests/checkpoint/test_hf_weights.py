"""Directories as people have them: other weights beside the model's, left alone; two whole models are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meta_files import write_meta
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.convert import convert
from llmpipe.checkpoint.describe import describe
from llmpipe.checkpoint.formats import detect
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.hf_weights import BIN_INDEX
from llmpipe.errors import UserError
from llmpipe.verify.gate import open_kind, verify
from llmpipe.verify.hf_files import WeightFiles

Tensors = dict[str, torch.Tensor]
OTHER = {"model.norm.weight": torch.zeros(32)}


def in_parts(hf: Path) -> None:
    """The weights in numbered files with an index, as transformers saves them."""
    LlamaForCausalLM.from_pretrained(hf).save_pretrained(hf, max_shard_size="100KB")
    (hf / "model.safetensors").unlink(missing_ok=True)
    assert (hf / safetensors_file.INDEX).is_file()


def mistrals_own(hf: Path) -> None:
    save_file(OTHER, hf / "consolidated.safetensors")
    (hf / "params.json").write_text('{"dim": 32}')


def an_adapter(hf: Path) -> None:
    save_file(OTHER, hf / "adapter_model.safetensors")
    (hf / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def a_trainers(hf: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(3)}, hf / name)
    (hf / "global_step5").mkdir()
    torch.save({}, hf / "global_step5/mp_rank_00_model_states.pt")


def other_frameworks(hf: Path) -> None:
    (hf / "flax_model.msgpack").write_bytes(b"\x81\xa6params\x80")
    for name in ("tf_model.h5", "model.Q4_K_M.gguf"):
        (hf / name).write_bytes(b"GGUF" * 9)


def older_bin_files(hf: Path) -> None:
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        torch.save({}, hf / name)
    (hf / BIN_INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.bin"}}))


def metas_in_a_folder(hf: Path) -> None:
    write_meta(hf / "original", load_file(next(hf.glob("model*.safetensors"))), 1)


BESIDE: dict[Callable[[Path], None], list[str]] = {
    mistrals_own: ["consolidated.safetensors"],
    an_adapter: ["adapter_model.safetensors"],
    a_trainers: ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "global_step5/"],
    other_frameworks: ["flax_model.msgpack", "model.Q4_K_M.gguf", "tf_model.h5"],
    older_bin_files: ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", BIN_INDEX],
    metas_in_a_folder: ["original/"],
}


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: beside.__name__)
@pytest.mark.parametrize("parts", [False, True])
def test_what_lies_beside_is_left_alone(
    hf: Path, hf_tensors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    beside: Callable[[Path], None], parts: bool,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    if parts:
        in_parts(hf)
    names = sorted(path.name for path in hf.glob("model*.safetensors"))
    beside(hf)
    convert(hf, tmp_path / "out")
    found = {
        name: tensor for path in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert found.keys() == hf_tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in hf_tensors.items())
    taken = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    assert f"{hf}: {taken} taken; left alone: {', '.join(BESIDE[beside])}" in caplog.messages
    assert WeightFiles(hf).files == WeightFiles(tmp_path / "out").files  # verify reads the same ones
    assert open_kind(hf) == "Hugging Face"


def test_an_adapter_beside_older_weights(hf: Path, hf_tensors: Tensors) -> None:
    (hf / "model.safetensors").unlink()
    torch.save(hf_tensors, hf / "pytorch_model.bin")
    an_adapter(hf)
    torch.save({}, hf / "pytorch_model_fsdp.bin")
    assert torch.equal(HfSource(hf).read("norm.weight"), hf_tensors["model.norm.weight"])
    assert set(WeightFiles(hf).files.values()) == {"pytorch_model.bin"}


def test_an_index_that_was_left_behind(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (hf / safetensors_file.INDEX).write_text(json.dumps(index))
    convert(hf, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    assert any("which is missing: model.safetensors is taken" in message for message in caplog.messages)
    verify(tmp_path / "out", hf, tmp_path / "card.json")


def test_two_whole_models_are_refused(hf: Path, tmp_path: Path) -> None:
    shutil.copy(hf / "model.safetensors", tmp_path / "whole")
    in_parts(hf)
    shutil.copy(tmp_path / "whole", hf / "model.safetensors")
    with pytest.raises(UserError, match=r"holds the model twice, as model\.safetensors and as the \d+ files of model"):
        HfSource(hf)
    (hf / safetensors_file.INDEX).unlink()
    with pytest.raises(UserError, match=r"model-00001.* and no model\.safetensors\.index\.json that says which"):
        HfSource(hf)


def test_an_adapter_alone_is_no_model(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").unlink()
    an_adapter(hf)
    with pytest.raises(UserError, match=r"hf holds an adapter, not a model: name the weights .* with --adapter .*hf"):
        detect(hf)
    manifest.write(hf, "weights", {})  # as a run publishes one
    said = describe(hf)
    assert said.startswith(f"weights {hf}\n") and "r is None, expected a number above 0" in said


def test_weights_one_folder_deeper_are_named(hf: Path, tmp_path: Path) -> None:
    metas_in_a_folder(hf)
    (hf / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=f"config.json, generation_config.json, original found; weights lie in {hf}/orig"
    ):
        detect(hf)
    assert detect(hf / "original") == "meta"


def test_weights_without_their_config_are_told(hf: Path) -> None:
    (hf / "config.json").unlink()
    with pytest.raises(
        UserError, match=f"{hf}/config.json is missing beside weights in Hugging Face's format: copy or"
    ):
        detect(hf)


def test_a_folder_of_the_hubs_cache_names_its_snapshots(hf: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    hf.rename(cache / "snapshots/0123")
    with pytest.raises(UserError, match=f"blobs, snapshots found; weights lie in {cache}/snapshots/0123; there may"):
        detect(cache)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_files_that_git_lfs_did_not_fetch(hf: Path, tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (hf / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name} is a pointer of git-lfs, not the file itself: run git lfs pull"):
        convert(hf, tmp_path / "out")
