"""torch.distributed.checkpoint is the judge: what it writes is read, what was damaged afterwards is refused."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch_files import loaded

from llmpipe.checkpoint.containers.distcp import Sharded, locate, read_distcp
from llmpipe.checkpoint.containers.torch_file import read_torch_file, verify_crc
from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def full(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number)).bfloat16()


def joined(tensor: Sharded) -> torch.Tensor:
    """The whole tensor, from its chunks; 99 stays where none is."""
    out = torch.full(tensor.shape, 99, dtype=tensor.dtype)
    for chunk in tensor.chunks:
        place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        out[place] = loaded(locate(tensor, chunk))
    return out


def save_sharded(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    state = {
        "weight": distribute_tensor(full(0, 7, 10), mesh, [Shard(0), Shard(1)]),
        "rows": distribute_tensor(full(1, 5, 3), mesh, [Replicate(), Shard(0)]),
        "cube": distribute_tensor(full(2, 4, 3, 2), mesh, [Shard(0), Replicate()]),
        "norm": full(3, 6),
        "step": 7,
    }
    dcp.save(state, checkpoint_id=path)
    dist.barrier()


def test_chunks_of_four_ranks(tmp_path: Path) -> None:
    run_ranks(save_sharded, 4, tmp_path / "checkpoint")
    found = read_distcp(tmp_path / "checkpoint")
    expected = {"weight": full(0, 7, 10), "rows": full(1, 5, 3), "cube": full(2, 4, 3, 2), "norm": full(3, 6)}
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(joined(found.tensors[name]), tensor), name
    assert len(found.tensors["weight"].chunks) == 4
    assert len({chunk.item.file for chunk in found.tensors["weight"].chunks}) == 4
    step = found.objects["step"]
    assert read_torch_file(step.file, stand_ins=True, start=step.start, size=step.size) == 7


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"model": {"a": full(0, 6, 4), "b": torch.zeros(0, 3)}, "list": [torch.arange(3)]}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def test_nested_names_and_empty_tensors(saved: Path) -> None:
    found = read_distcp(saved).tensors
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "model.a": (6, 4), "model.b": (0, 3), "list.0": (3,)
    }  # fmt: skip
    assert torch.equal(joined(found["model.a"]), full(0, 6, 4))
    assert torch.equal(joined(found["list.0"]), torch.arange(3))


def changed(saved: Path, change: Callable[[Metadata], Any]) -> None:
    """The metadata with a change, by torch's own classes."""
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))


def boxes(metadata: Metadata, name: str, chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Other chunks for a tensor, all in the place of its first."""
    entry: Any = metadata.state_dict_metadata[name]
    place = metadata.storage_data[MetadataIndex(name, [0] * len(entry.size))]
    entry.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    metadata.storage_data |= {MetadataIndex(name, offsets): place for offsets, _ in chunks}


def test_a_chunk_with_a_dimension_more_than_its_bytes(saved: Path) -> None:
    """Megatron stacks its layers: (layers, rows, columns) from files of (rows, columns)."""

    def stack(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.a"].size = torch.Size((1, 6, 4))  # pyright: ignore
        metadata.storage_data[MetadataIndex("model.a", [0, 0, 0])] = metadata.storage_data[
            MetadataIndex("model.a", [0, 0])
        ]
        boxes(metadata, "model.a", [((0, 0, 0), (1, 6, 4))])

    changed(saved, stack)
    tensor = read_distcp(saved).tensors["model.a"]
    assert locate(tensor, tensor.chunks[0]).strides == (24, 4, 1)
    assert torch.equal(joined(tensor), full(0, 6, 4)[None])


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([((0, 0), (5, 4))], "is not covered"),
        ([((0, 0), (7, 4))], "outside"),
        ([((0, 0), (3, 4)), ((3, 0), (4, 4))], "outside"),
        ([((0, 0), (3, 4)), ((2, 0), (3, 4))], "overlap"),
        ([((0, 0), (3, 4)), ((0, 0), (3, 4))], "two chunks"),
        ([((0,), (24,))], "other dimensions"),
        ([], "is not covered"),
    ],
)
def test_chunks_that_do_not_cover(saved: Path, chunks: Any, message: str) -> None:
    changed(saved, lambda metadata: boxes(metadata, "model.a", chunks))
    with pytest.raises(UserError, match=rf"\.metadata: model\.a of size \[6, 4\] .*{message}"):
        read_distcp(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_path": "../x.distcp"}, "points outside"),
        ({"relative_path": "/etc/passwd"}, "points outside"),
        ({"relative_path": "__1_0.distcp"}, r"__1_0\.distcp is missing"),
        ({"offset": 1 << 40}, "is truncated"),
        ({"offset": -1}, "is truncated"),
        ({"length": 1 << 40}, "is truncated"),
        ({"transform_descriptors": ["stream.zstd/1"]}, r"compressed \(stream\.zstd/1\)"),
    ],
)
def test_places_that_are_wrong(saved: Path, change: dict[str, Any], message: str) -> None:
    def move(metadata: Metadata) -> None:
        index = MetadataIndex("model.a", [0, 0])
        metadata.storage_data[index] = replace(metadata.storage_data[index], **change)

    changed(saved, move)
    with pytest.raises(UserError, match=message):
        read_distcp(saved)


def test_a_place_that_is_missing(saved: Path) -> None:
    changed(saved, lambda metadata: metadata.storage_data.pop(MetadataIndex("model.a", [0, 0])))
    with pytest.raises(UserError, match=r"says of model\.a at \[0, 0\] no place"):
        read_distcp(saved)


def test_bytes_of_another_tensor(saved: Path) -> None:
    def swap(metadata: Metadata) -> None:
        a, other = MetadataIndex("model.a", [0, 0]), MetadataIndex("list.0", [0])
        metadata.storage_data[a] = metadata.storage_data[other]

    changed(saved, swap)
    tensor = read_distcp(saved).tensors["model.a"]
    with pytest.raises(
        UserError, match=r"for model\.a at \[0, 0\] torch\.int64 \[3\], expected torch\.bfloat16 \[6, 4\]"
    ):
        locate(tensor, tensor.chunks[0])


def test_a_file_cut_short(saved: Path) -> None:
    (file,) = saved.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"__0_0\.distcp is truncated"):
        read_distcp(saved)


def test_damaged_bytes_of_a_chunk(saved: Path) -> None:
    tensor = read_distcp(saved).tensors["model.a"]
    item = tensor.chunks[0].item
    with item.file.open("r+b") as file:
        file.seek(item.start)
        file.write(bytes(item.size))
    with pytest.raises(UserError, match=r"__0_0\.distcp is truncated or no file of torch\.save"):
        locate(tensor, tensor.chunks[0])


def test_a_flipped_bit_of_a_chunk_is_found_by_its_checksum(saved: Path) -> None:
    tensor = read_distcp(saved).tensors["model.a"]
    item = tensor.chunks[0].item
    assert verify_crc(item.file, start=item.start, size=item.size)
    place = locate(tensor, tensor.chunks[0]).offset + 11
    with item.file.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged \(the checksum of archive/data/0 differs"):
        verify_crc(item.file, start=item.start, size=item.size)


def test_metadata_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata is missing"):
        read_distcp(tmp_path)


class Attack:
    def __reduce__(self) -> Any:
        return eval, ("open('canary', 'w')",)


def test_metadata_that_would_run_code(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = {"a": Attack()}
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"asks for builtins\.eval"):
        read_distcp(saved)
    assert not Path("canary").exists()


@pytest.mark.parametrize("value", [None, [], {"state_dict_metadata": {}}, Metadata({}), Metadata({"a": 1}, None, {})])
def test_other_pickles(tmp_path: Path, value: Any) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=r"not what torch\.distributed\.checkpoint writes"):
        read_distcp(tmp_path)
