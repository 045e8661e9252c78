"""Hugging Face's older files, pytorch_model.bin: torch.save writes them beside us."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llmpipe.checkpoint.convert import convert
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.hf_weights import BIN_INDEX
from llmpipe.errors import UserError

Tensors = dict[str, torch.Tensor]


def write_bin(directory: Path, tensors: Tensors, files: int) -> None:
    """The weights in `files` files, with an index beside more than one."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    names = (
        ["pytorch_model.bin"]
        if files == 1
        else [f"pytorch_model-{at + 1:05d}-of-{files:05d}.bin" for at in range(files)]
    )
    parts = [list(tensors)[at::files] for at in range(files)]
    for name, keys in zip(names, parts, strict=True):
        torch.save({key: tensors[key] for key in keys}, directory / name)
    if files > 1:
        table = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        (directory / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize("files", [1, 3])
def test_becomes_safetensors_of_the_same_tensors(hf: Path, hf_tensors: Tensors, tmp_path: Path, files: int) -> None:
    half = {name: tensor.bfloat16() for name, tensor in hf_tensors.items()}
    write_bin(hf, half, files)
    made = convert(hf, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == half.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in half.items())
    assert len([name for name in made.source["files"] if name.endswith(".bin")]) == files


def test_transformers_computes_the_same(hf: Path, hf_llama: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    write_bin(hf, hf_tensors, 2)
    convert(hf, tmp_path / "out")
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (hf_llama, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(*(model(torch.arange(40).view(2, 20)).logits for model in (before, after)))


def test_views_parameters_and_old_buffers(hf: Path, hf_tensors: Tensors) -> None:
    """What model.state_dict() and hand-written savers leave in such files."""
    held: dict[str, Any] = dict(hf_tensors)
    down, norm = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    held[down] = held[down].t().contiguous().t()
    held[norm] = torch.nn.Parameter(held[norm])
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_bin(hf, held, 1)
    source = HfSource(hf)
    assert torch.equal(source.read("layers.0.mlp.down.weight"), hf_tensors[down])
    part = (slice(3, 9), slice(2, 7))
    assert torch.equal(source.read("layers.0.mlp.down.weight", part), hf_tensors[down][part])
    assert torch.equal(source.read("norm.weight"), hf_tensors[norm])


def test_safetensors_are_preferred(hf: Path, hf_tensors: Tensors) -> None:
    torch.save({}, hf / "pytorch_model.bin")
    assert torch.equal(HfSource(hf).read("norm.weight"), hf_tensors["model.norm.weight"])


def test_a_missing_file_is_named(hf: Path, hf_tensors: Tensors) -> None:
    write_bin(hf, hf_tensors, 3)
    (hf / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        HfSource(hf)


def test_files_without_an_index(hf: Path, hf_tensors: Tensors) -> None:
    write_bin(hf, hf_tensors, 2)
    (hf / BIN_INDEX).unlink()
    with pytest.raises(UserError, match=r"no pytorch_model\.bin\.index\.json"):
        HfSource(hf)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", 3])
def test_an_index_that_points_elsewhere(hf: Path, hf_tensors: Tensors, name: Any) -> None:
    write_bin(hf, hf_tensors, 2)
    index = json.loads((hf / BIN_INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (hf / BIN_INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file beside it"):
        HfSource(hf)


def test_an_index_that_disagrees(hf: Path, hf_tensors: Tensors) -> None:
    write_bin(hf, hf_tensors, 2)
    first, second = sorted(hf.glob("*.bin"))
    first.rename(hf / "x")
    second.rename(first)
    (hf / "x").rename(second)
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00002\.bin and the index of .* disagree"):
        HfSource(hf)


class Attack:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_a_file_that_would_run_code_makes_nothing(hf: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    write_bin(hf, {**hf_tensors, "x": Attack(tmp_path / "canary")}, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"pytorch_model\.bin is refused: it asks for (posix|os)\.system"):
        convert(hf, tmp_path / "out")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()


def test_more_than_tensors_is_left_over(hf: Path, hf_tensors: Tensors) -> None:
    write_bin(hf, {**hf_tensors, "extra": torch.ones(2)}, 1)
    with pytest.raises(UserError, match="left over: extra"):
        HfSource(hf)
