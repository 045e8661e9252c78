"""Files with holes: torch.load and Python's zipfile open what was filled in."""

import resource
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import STORAGES, read_torch_file, tensors, verify_crc
from llmpipe.checkpoint.containers.torch_skeleton import seal, write_skeleton
from llmpipe.checkpoint.containers.zip_records import combined_crc
from llmpipe.errors import UserError

DTYPES = [dtype for name, dtype in STORAGES.items() if name != "UntypedStorage"]


def hole(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def fill(places: dict[str, StoredTensor], values: dict[str, torch.Tensor]) -> None:
    for name, tensor in values.items():
        with places[name].file.open("r+b") as file:
            file.seek(places[name].offset)
            file.write(raw(tensor))


def test_torch_opens_what_was_filled(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    values = {str(dtype)[6:]: torch.arange(15).view(3, 5).to(dtype) for dtype in DTYPES}
    values |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(7.0)}
    places = write_skeleton(path, {name: hole(tensor) for name, tensor in values.items()})
    assert {name: (stored.dtype, stored.shape) for name, stored in places.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()
    }
    assert all(stored.offset % 64 == 0 for stored in places.values())
    fill(places, values)
    seal(path)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert found.keys() == values.keys()
        for name, tensor in values.items():
            assert found[name].is_contiguous() and found[name].stride() == tensor.stride()
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert verify_crc(path)


def megatron(weight: torch.Tensor, tied: torch.Tensor, rng: torch.Tensor) -> dict[str, Any]:
    return {
        "args": Namespace(num_layers=2, lr=0.1, params_dtype=torch.bfloat16, swiglu=True, model=None),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": {"language_model": {"encoder": {"layers.0.weight": weight}, "tied": tied, "again": tied}},
        "rng_state": [{"torch": rng, "list": [1, 2, (3,)]}],
    }


def test_a_megatron_tree(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    weight, tied, rng = torch.randn(4, 6), torch.randn(5), torch.arange(100, dtype=torch.uint8)
    holes = hole(weight), hole(tied)
    places = write_skeleton(path, megatron(*holes, rng.view(10, 10).t()))
    assert places["model.language_model.tied"] == places["model.language_model.again"]
    fill(places, {"model.language_model.encoder.layers.0.weight": weight, "model.language_model.tied": tied})
    seal(path)
    found = torch.load(path, weights_only=False)
    inner = found["model"]["language_model"]
    assert torch.equal(inner["encoder"]["layers.0.weight"], weight) and torch.equal(inner["again"], tied)
    assert inner["tied"].untyped_storage().data_ptr() == inner["again"].untyped_storage().data_ptr()
    assert torch.equal(found["rng_state"][0]["torch"], rng.view(10, 10).t())
    assert found["args"] == megatron(*holes, rng)["args"] and found["checkpoint_version"] == 3.0
    assert tensors(read_torch_file(path)) == places


def test_checksums_that_are_known_are_not_computed(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    values = {"a": torch.randn(1000), "b": torch.randn(10)}
    places = write_skeleton(path, {name: hole(tensor) for name, tensor in values.items()})
    fill(places, values)
    seal(path, {places["a"].offset: zlib.crc32(raw(values["a"]))})
    assert verify_crc(path)
    seal(path, {places["a"].offset: 1})
    with pytest.raises(UserError, match=r"file/data/0"):
        verify_crc(path)


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 5), (5, 1), (1000, 123_457), (3, 8 << 20)])
def test_checksums_of_pieces_add_up(sizes: tuple[int, int]) -> None:
    first, second = (torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes() for size in sizes)
    assert combined_crc(zlib.crc32(first), zlib.crc32(second), sizes[1]) == zlib.crc32(first + second)


def test_files_beyond_4_gb_take_neither_memory_nor_disk(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes = {"small": (3,), "large": (3 << 16, 1 << 14), "after": (5, 7), "last": (2,)}  # 6 GB between
    places = write_skeleton(
        path, {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    )
    values = {
        "small": torch.randn(3).bfloat16(),
        "after": torch.randn(5, 7).bfloat16(),
        "last": torch.ones(2).bfloat16(),
    }
    fill(places, values)
    seal(path, {places["large"].offset: 0x12345678})
    assert places["after"].offset > 1 << 32
    found = torch.load(path, weights_only=True, mmap=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in values.items())
    assert found["large"].shape == shapes["large"] and not found["large"][-1].any()
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("large/data/1").CRC == 0x12345678
        assert archive.read("large/data/2") == raw(values["after"])
    assert path.stat().st_blocks * 512 < 1 << 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 100 << 20


def test_the_same_tree_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_skeleton(tmp_path / name / "rank.pt", {"a": torch.ones(3)})
    assert (tmp_path / "a/rank.pt").read_bytes() == (tmp_path / "b/rank.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a/rank.pt") as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"rank"}  # as torch.save names it


def test_a_dtype_without_a_storage_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float8_e4m3fn"):
        write_skeleton(tmp_path / "a.pt", {"a": torch.empty(3, dtype=torch.float8_e4m3fn, device="meta")})
