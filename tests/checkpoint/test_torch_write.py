"""Torch files made of a source: torch and Python's zipfile open them, their checksums taken while bytes were moved."""

import hashlib
import zipfile
from argparse import Namespace
from pathlib import Path

import torch

from llmpipe.checkpoint.containers.torch_file import verify_crc
from llmpipe.checkpoint.hf import HfSource, stored_dtype
from llmpipe.checkpoint.layouts import hf_layout
from llmpipe.checkpoint.mover import Filled, Mover
from llmpipe.checkpoint.torch_write import write_torch_files
from llmpipe.families import FAMILIES


def test_files_of_any_tree(hf_llama: Path, hf_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = HfSource(hf_llama)
    layout = hf_layout(FAMILIES["llama"], source.shape)
    filled = {stored.name: Filled(stored, stored_dtype(source, stored)) for stored in layout}
    extra = {"args": Namespace(lr=0.1, params_dtype=torch.bfloat16), "rng_state": torch.arange(3), "iteration": 1}
    trees = {f"a/{number}/x.pt": {"model": {"all": filled}, "number": number, **extra} for number in range(3)}
    hashes = write_torch_files(Mover(source), tmp_path, trees)
    assert hashes.keys() == trees.keys()
    for number, (name, digest) in enumerate(hashes.items()):
        path = tmp_path / name
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert verify_crc(path)
        assert zipfile.ZipFile(path).testzip() is None
        tree = torch.load(path, weights_only=False)  # we wrote it
        assert (tree["number"], tree["iteration"], tree["args"]) == (number, 1, extra["args"])
        assert torch.equal(tree["rng_state"], torch.arange(3))
        assert tree["model"]["all"].keys() == hf_tensors.keys()
        assert all(torch.equal(tensor, hf_tensors[key]) for key, tensor in tree["model"]["all"].items())


def test_a_mover_that_takes_no_hashes(hf_llama: Path, tmp_path: Path) -> None:
    source = HfSource(hf_llama)
    stored = hf_layout(FAMILIES["llama"], source.shape)[0]
    trees = {"x.pt": {"embedding": Filled(stored, torch.float16)}}
    assert write_torch_files(Mover(source, hashed=False), tmp_path, trees) == {"x.pt": None}
    assert verify_crc(tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)["embedding"]
    assert torch.equal(found, source.read("embedding.weight").half())
