"""A Hugging Face source: transformers on the source is one side, our decoder on the checkpoint the other."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import edit, edit_config, make_hf, sign

from llmpipe.errors import UserError
from llmpipe.verify.gate import open_reference, verify
from llmpipe.verify.hf import HfModel


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = make_hf(tmp_path_factory.mktemp("source") / "hf", torch.bfloat16)
    (path / "manifest.json").unlink()  # as it was downloaded
    return path


@pytest.fixture
def checkpoint(source, tmp_path) -> Path:
    path = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    sign(path)
    return path


def first_difference(checkpoint: Path, source: Path) -> str:
    with pytest.raises(UserError):
        verify(checkpoint, source)
    return json.loads((checkpoint.parent / "verify.failed.json").read_text())["first_difference"]


def test_a_copy_passes(source, checkpoint):
    assert verify(checkpoint, source)["verdict"] == "pass"


@pytest.mark.parametrize("layer", [0, 3])
def test_a_mistake_of_the_decoder_is_found_in_its_layer(source, checkpoint, monkeypatch, layer):
    from llmpipe.verify import ours

    right, calls = ours.rope_table, []

    def wrong(positions, *rest):
        calls.append(1)  # each layer runs twice: on its own states, and on the reference's
        return right(positions * 2 if (len(calls) - 1) // 2 >= layer else positions, *rest)

    monkeypatch.setattr(ours, "rope_table", wrong)
    assert first_difference(checkpoint, source).startswith(f"layer {layer} ")


def test_changed_values_and_settings_are_found(source, checkpoint):
    def double(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] *= 2

    edit(checkpoint, double)
    assert first_difference(checkpoint, source).startswith("layer 1 ")
    shutil.copy(source / "model.safetensors", checkpoint)
    edit_config(checkpoint, rms_norm_eps=1e-4)
    assert first_difference(checkpoint, source).startswith("layer 0 ")


def test_a_missing_tensor_is_found(source, checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    assert first_difference(checkpoint, source) == "model.layers.3.mlp.up_proj.weight"


def test_sharded_files_are_read_and_their_index_is_believed_only_if_it_is_right(source, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    weight_map = {name: file for file, part in files.items() for name in part}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, checkpoint / file, metadata={"format": "pt"})
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sign(checkpoint)
    assert verify(checkpoint, source)["verdict"] == "pass"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | {names[0]: "elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=re.escape(f"disagrees with the files: {names[0]} is in model-00001")):
        HfModel(checkpoint)


def test_damaged_directories_are_refused(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        HfModel(checkpoint)
    file.unlink()
    with pytest.raises(UserError, match=r"has config.json but no \*.safetensors"):
        HfModel(checkpoint)
    edit_config(checkpoint, model_type="gpt2")
    with pytest.raises(UserError, match="model_type 'gpt2': llmpipe verifies llama, mistral"):
        HfModel(checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config.json cannot be read by transformers"):
        HfModel(checkpoint)
    with pytest.raises(UserError, match=r"is no reference: expected Hugging Face's config"):
        open_reference(tmp_path)


def test_tensors_of_several_types_find_their_partners(source, checkpoint):
    def norm_in_fp32(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    edit(checkpoint, norm_in_fp32)
    storage = next(check for check in verify(checkpoint, source)["checks"] if check["name"] == "storage")
    assert storage["detail"] == "bfloat16 stored as bfloat16, float32, without rounding"
