"""Every family through every format at several layouts: the same bits, the same settings, transformers' logits."""

import json
import re
from pathlib import Path

import pytest
import torch
from matrix_cells import (
    FORMATS,
    HOLDS,
    LIMIT,
    RANKS,
    SPLITS,
    UNSAID,
    Made,
    back,
    deal,
    difference,
    make,
    plain_forward,
    same_bits,
    there,
    unequal,
    unlike,
)
from matrix_models import MODELS, make_model, save
from safetensors.torch import load_file
from transformers import AutoConfig

from llmpipe.checkpoint.convert import Target, convert, merge
from llmpipe.checkpoint.formats import open_source
from llmpipe.errors import UserError
from llmpipe.verify import gate
from llmpipe.verify.compare import probe
from llmpipe.verify.gate import verify
from llmpipe.verify.hf import HfModel
from llmpipe.verify.ours import OurModel
from llmpipe.verify.rank_files import bit_checks

CANNOT = "has no|knows no|cannot|share|no place|not computed|expected|equally|evenly"
IN_PROCESSES = {("llama 3.2", "2x2 vp2"), ("llama 8/2", "4x1")}
"""Rank files whose forward runs in tp x pp processes too; tests/verify has more."""


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp("model"))


def test_a_checkpoint_is_transformers_files_and_computes_their_logits(made: Made) -> None:
    assert not unequal(made, made.checkpoint)
    ours, theirs = (AutoConfig.from_pretrained(path).to_dict() for path in (made.checkpoint, made.hf))
    assert {**ours, "_name_or_path": None} == {**theirs, "_name_or_path": None}
    assert difference(made, HfModel(made.checkpoint)) <= LIMIT
    assert difference(made, OurModel(made.checkpoint)) <= LIMIT


def settings(path: Path) -> dict[str, float | str]:
    """All but the special tokens, which other formats leave to the tokenizer; these models have none."""
    return {name: value for name, value in HfModel(path).hyper_parameters().items() if not name.endswith("token")}


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(made: Made, name: str, tmp_path: Path) -> None:
    if name not in HOLDS[made.name]:
        with pytest.raises(UserError, match=CANNOT):
            there(made, name, tmp_path / "there")
        return
    written = there(made, name, tmp_path / "there")
    assert unlike(open_source(written).shape, made.shape) <= UNSAID[name.split()[0]]
    again = back(made, written, tmp_path / "checkpoint")
    assert not unequal(made, again)
    assert open_source(again).shape == made.shape
    assert settings(again) == settings(made.hf)
    assert plain_forward(made, written) <= LIMIT
    if name == next(one for one in HOLDS[made.name] if one.split()[0] == name.split()[0]):  # all: planted_faults.py
        assert verify(again, written)["verdict"] == "pass"
        assert verify(written, made.checkpoint)["verdict"] == "pass"


@pytest.mark.parametrize("name", RANKS)
def test_rank_files_there_and_back(made: Made, name: str, tmp_path: Path) -> None:
    if name not in SPLITS.get(made.name, RANKS):
        with pytest.raises(UserError, match=r"heads|layers|share"):
            deal(made, name, tmp_path / "ranks")
        return
    ranks = deal(made, name, tmp_path / "ranks")
    merge(ranks, tmp_path / "merged")
    assert not unequal(made, tmp_path / "merged")
    assert bit_checks(ranks, HfModel(made.checkpoint))[1] is None
    assert difference(made, OurModel(ranks)) <= LIMIT
    if (made.name, name) in IN_PROCESSES:
        assert verify(ranks, made.checkpoint)["verdict"] == "pass"


@pytest.mark.parametrize("name", ["llama 8/2", "falcon new decoder", "qwen3"])
@pytest.mark.parametrize("form", ["many files", "bin", "many bins"])
def test_every_form_of_hugging_face_s_files(name: str, form: str, tmp_path: Path) -> None:
    whole = load_file(save(name, tmp_path / "whole") / "model.safetensors")
    source = save(name, tmp_path / "source", max_shard_size="50KB" if "many" in form else "5GB")
    if "bin" in form:
        as_bins(source)
    assert len([*source.glob("*.bin"), *source.glob("*.safetensors")]) > 2 * ("many" in form)
    convert(source, tmp_path / "checkpoint")
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "checkpoint").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == whole.keys() and all(same_bits(found[key], whole[key]) for key in whole)
    assert verify(tmp_path / "checkpoint", source)["verdict"] == "pass"


def as_bins(directory: Path) -> None:
    """safetensors as torch.save would have written them, with their index."""
    for file in directory.glob("*.safetensors"):
        torch.save(load_file(file), directory / f"{_bin(file.stem)}.bin")
        file.unlink()
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {key: f"{_bin(Path(file).stem)}.bin" for key, file in content["weight_map"].items()}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def _bin(stem: str) -> str:
    return re.sub(r"^model", "pytorch_model", stem)


@pytest.mark.parametrize("name", ["llama 3.2", "falcon 71/1", "qwen2 window"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_are_torch_s(name: str, stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source", stored)
    convert(source, tmp_path / "cast", Target(dtype=asked))
    found = load_file(tmp_path / "cast/model.safetensors")
    expected = {key: tensor.to(asked) for key, tensor in load_file(source / "model.safetensors").items()}
    assert found.keys() == expected.keys() and all(same_bits(found[key], expected[key]) for key in found)
    assert AutoConfig.from_pretrained(tmp_path / "cast").dtype == asked
    assert verify(tmp_path / "cast", source)["verdict"] == "pass"


@pytest.mark.parametrize("name", ["meta 2", "mcore 2x2", "easylm"])
def test_casts_into_other_formats_are_torch_s(name: str, tmp_path: Path) -> None:
    made = make("llama 8/2", tmp_path)
    target = FORMATS[name]
    convert(
        made.checkpoint, tmp_path / "there", Target(target.to, target.dialect, target.tp, target.stages, torch.bfloat16)
    )
    again = load_file(back(made, tmp_path / "there", tmp_path / "again") / "model.safetensors")
    assert all(same_bits(again[key], tensor.to(torch.bfloat16)) for key, tensor in made.tensors.items())
    assert verify(tmp_path / "there", made.checkpoint)["verdict"] == "pass"


def test_long_positions_are_looked_at_where_no_side_is_hugging_faces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as Llama 3.1's scaling stretches them; neither side says the longest sequence of 131072."""
    made, asked = make("llama 3.1", tmp_path), []
    convert(there(made, "meta 2", tmp_path / "meta"), tmp_path / "mcore", FORMATS["mcore 2x2"])
    monkeypatch.setattr(gate, "probe", lambda vocab, longest: asked.append(longest) or probe(vocab, longest))
    assert verify(tmp_path / "mcore", tmp_path / "meta")["verdict"] == "pass"
    assert asked == [8 * 8192]


def test_the_models_have_no_two_tensors_alike() -> None:
    for name in MODELS:
        tensors = dict(make_model(name).named_parameters())
        assert len({tensor.detach().numpy().tobytes() for tensor in tensors.values()}) == len(tensors)
