"""torch.load is the judge of what is read; crafted files are the judge of what is refused."""

import io
import pathlib
import random
import re
import signal
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch_files import all_loaded, filled, loaded, write_zip

from llmpipe.checkpoint.containers.inert import StandIn
from llmpipe.checkpoint.containers.inert_names import Array
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import read_torch_file, tensors, verify_crc
from llmpipe.errors import UserError

DTYPES = (
    torch.bfloat16, torch.bool, torch.complex64, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.int16, torch.int32, torch.int64, torch.int8, torch.uint16, torch.uint8,
)  # fmt: skip


def plain() -> Any:
    whole = filled(6, 8)
    parameter = torch.nn.Parameter(filled(3, 5, dtype=torch.bfloat16))
    marked = filled(4)
    marked.partition_dim = 0  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "views": [whole, whole.t(), whole[1:5:2, 3:], whole[3], whole[2, 3], whole.expand(2, 6, 8)],
        "parameter": parameter,
        "attributes": marked,
        "attributes of a parameter": torch.nn.Parameter(marked),
        "empty": (torch.empty(0), torch.empty(3, 0, 2)),
        "scalar": torch.tensor(7.0),
        "module": torch.nn.Linear(3, 2).state_dict(),
        "types": OrderedDict((str(dtype), filled(5, dtype=dtype)) for dtype in DTYPES),
        "storage": torch.arange(3),
        7: [
            None,
            True,
            False,
            1,
            300,
            -70000,
            1 << 70,
            0.5,
            "ü" * 300,
            b"\0\xff",
            (1, (2, 3)),
            {1, 2},
            torch.Size([2]),
        ],
    }


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(
            found.contiguous().view(-1).view(torch.uint8), expected.detach().reshape(-1).view(torch.uint8)
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_load_reads(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "file.pt"
    torch.save(plain(), path, pickle_protocol=protocol)
    same(all_loaded(read_torch_file(path)), torch.load(path, weights_only=False))
    assert verify_crc(path)


def test_shared_storages_are_one_place(tmp_path: Path) -> None:
    tensor = filled(4, 4)
    torch.save({"a": tensor, "b": tensor, "c": tensor[1:]}, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt")
    assert found["a"] == found["b"]
    assert found["c"].offset == found["a"].offset + 16


def test_offsets_are_the_ones_of_the_zip(tmp_path: Path) -> None:
    torch.save({"a": filled(5), "b": filled(3, 3)}, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        data = (tmp_path / "file.pt").read_bytes()
        for number, key in enumerate("ab"):
            wanted = archive.read(f"file/data/{number}")
            assert data[found[key].offset :][: len(wanted)] == wanted


def test_a_part_of_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(filled(5), buffer)
    path = tmp_path / "file"
    path.write_bytes(b"before" + buffer.getvalue() + b"after")
    stored = read_torch_file(path, start=6, size=len(buffer.getvalue()))
    same(loaded(stored), filled(5))


def test_the_bytes_of_tensors_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": filled(5)}, path)
    offset = read_torch_file(path)["a"].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\1" * 20)
    assert read_torch_file(path)["a"].offset == offset
    with pytest.raises(UserError, match="checksum of file/data/0 differs"):
        verify_crc(path)


def test_a_file_without_checksums_says_so(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(filled(5), tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not verify_crc(tmp_path / "file.pt")
    same(loaded(read_torch_file(tmp_path / "file.pt")), filled(5))


def test_tensors_are_named_by_their_path(tmp_path: Path) -> None:
    torch.save({"model": {"a.b": [filled(2), {"c": filled(3)}]}, "step": 3}, tmp_path / "file.pt")
    found = tensors(read_torch_file(tmp_path / "file.pt"))
    assert {name: stored.shape for name, stored in found.items()} == {"model.a.b.0": (2,), "model.a.b.1.c": (3,)}


def test_two_tensors_of_one_path_are_refused(tmp_path: Path) -> None:
    torch.save({"a": {"b.c": filled(1)}, "a.b": {"c": filled(1)}}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"a\.b\.c twice"):
        tensors(read_torch_file(tmp_path / "file.pt"))


# --- Megatron's files: foreign classes that this machine does not have


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """megatron.core.enums.ModelType and a config's class, importable while the file is written."""
    for name in ("megatron", "megatron.core", "megatron.core.enums"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module: Any = sys.modules["megatron.core.enums"]
    module.ModelType = Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)
    module.Config = type("Config", (), {"__module__": module.__name__})
    module.Slots = type("Slots", (dict,), {"__module__": module.__name__, "__slots__": ("x",)})
    module.Exotic = type("Exotic", (list,), {"__module__": module.__name__})
    yield module


def megatron_like(foreign: Any) -> Any:
    config = foreign.Config()
    config.activation = torch.nn.functional.gelu
    slots = foreign.Slots({"k": 1})
    slots.x = 3
    args = Namespace(
        model_type=foreign.ModelType.encoder_or_decoder, params_dtype=torch.bfloat16, lr=np.float64(0.25), num_layers=2,
        exit_signal=signal.SIGTERM, load=pathlib.Path("/a/b"), activation=torch.nn.functional.gelu, config=config,
        slots=slots, exotic=foreign.Exotic([1, 2]), number=np.int64(3), device=torch.device("cuda", 1), kind=float,
    )  # fmt: skip
    main = filled(4)
    main.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    rng = [
        {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(), "cuda": torch.get_rng_state()}
    ]
    extra = io.BytesIO(b"extra")
    extra.seek(0, io.SEEK_END)
    optimizer = {"optimizer": {"state": {0: {"exp_avg": filled(4), "step": 3}}}, "fp32_from_fp16_params": [[main]]}
    return {
        "args": args, "checkpoint_version": 3.0, "iteration": 10, "rng_state": rng, "optimizer": optimizer,
        "model": {"language_model": {"weight": filled(3, 3, dtype=torch.bfloat16), "_extra_state": extra}},
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_foreign_classes_become_stand_ins(tmp_path: Path, foreign: Any, protocol: int) -> None:
    path = tmp_path / "model_optim_rng.pt"
    torch.save(megatron_like(foreign), path, pickle_protocol=protocol)
    found = read_torch_file(path, stand_ins=True)
    args = found["args"]
    assert (args.params_dtype, args.lr, args.num_layers, args.number) == (torch.bfloat16, 0.25, 2, 3)
    assert (args.load, args.device) == (pathlib.PurePosixPath("/a/b"), "cuda:1")
    enum = args.model_type
    assert (enum.name, enum.args) in [
        ("megatron.core.enums.ModelType", (value,)) for value in (1, "encoder_or_decoder")
    ]
    assert (args.activation.name, args.activation.args) == ("torch._C._nn.gelu", None)
    assert args.config.state["activation"].name == "torch._C._nn.gelu"
    assert (args.slots.entries, args.slots.state) == ([("k", 1)], {"x": 3})
    assert args.exotic.entries == [1, 2]
    assert isinstance(args.exit_signal, StandIn) and isinstance(args.kind, StandIn)
    same(loaded(found["model"]["language_model"]["weight"]), filled(3, 3, dtype=torch.bfloat16))
    assert found["model"]["language_model"]["_extra_state"].state[""][0] == b"extra"
    same(loaded(found["optimizer"]["fp32_from_fp16_params"][0][0]), filled(4))
    state = found["rng_state"][0]
    assert state["random_rng_state"] == random.getstate()
    assert np.array_equal(state["np_rng_state"][1].numpy(), np.random.get_state()[1])


def test_foreign_classes_are_refused_where_none_belong(tmp_path: Path, foreign: Any) -> None:
    torch.save({"a": foreign.Config()}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"it asks for megatron\.core\.enums\.Config"):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "i2", "?", "u1", "<f2", "c8"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays(tmp_path: Path, dtype: str, protocol: int) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    torch.save([array, array.T, array[0, 1]], tmp_path / "file.pt", pickle_protocol=protocol)
    found = read_torch_file(tmp_path / "file.pt")
    assert isinstance(found[0], Array)
    assert np.array_equal(found[0].numpy(), array) and np.array_equal(found[1].numpy(), array.T)
    assert found[0].numpy().dtype == array.dtype and found[2] == array[0, 1].item()


def test_an_array_of_objects_is_kept_but_not_made(tmp_path: Path) -> None:
    torch.save(np.array([None, {}], dtype=object), tmp_path / "file.pt")
    with pytest.raises(ValueError, match="in the place of bytes"):
        read_torch_file(tmp_path / "file.pt").numpy()


# --- Damage


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 16) -> bytes:
    """ids of storages, as torch writes them"""
    out = b"(X\7\0\0\0storagectorch\n" + kind.encode() + b"\nX\1\0\0\0" + key.encode() + b"X\3\0\0\0cpu"
    return out + b"J" + struct.pack("<i", numel) + b"tQ"


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], **options: Any) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**options)
    return start + b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(strides) + b"\x89}tR."


def test_a_tensor_by_hand_is_read(tmp_path: Path) -> None:
    found = read_torch_file(write_zip(tmp_path / "file.pt", tensor(1, (3, 5), (5, 1))))
    assert isinstance(found, StoredTensor) and (found.shape, found.strides) == ((3, 5), (5, 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tensor(0, (17,), (1,)), "goes beyond its storage archive/data/0"),
        (tensor(2, (3, 5), (5, 1)), "goes beyond"),
        (tensor(0, (2, 2), (1 << 61, 1)), "goes beyond"),
        (tensor(-1, (3,), (1,)), "cannot be"),
        (tensor(3, (3,), (-1,)), "cannot be"),
        (tensor(0, (-3,), (1,)), "cannot be"),
        (tensor(0, (3, 1), (1,)), "cannot be"),
        (tensor(0, (1,) * 100, (1,) * 100), "cannot be"),
        (tensor(0, (1,), (1,), numel=17), "has 64 bytes, expected 68"),
        (tensor(0, (1,), (1,), numel=-1), "without a type or a size"),
        (tensor(0, (1,), (1,), key="1"), "the storage '1' is missing"),
        (tensor(0, (9,), (1,), kind="DoubleStorage"), "has 64 bytes"),
    ],
)
def test_a_tensor_that_does_not_fit(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_torch_file(write_zip(tmp_path / "file.pt", data))


def test_an_unknown_storage_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", tensor(0, (1,), (1,), kind="QInt8Storage"))
    with pytest.raises(UserError, match=r"torch\.QInt8Storage"):
        read_torch_file(path)


def test_a_conjugate_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(2, dtype=torch.complex64).conj(), tmp_path / "file.pt")
    with pytest.raises(UserError, match="conjugated"):
        read_torch_file(tmp_path / "file.pt")


def test_an_old_pickle_gets_advice(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"a": filled(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"torch 1\.5 or earlier.*save it again with torch\.save\(torch\.load\('old"):
        read_torch_file(path)


def test_a_torchscript_program_is_told_apart(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.", {"constants.pkl": b""})
    with pytest.raises(UserError, match="TorchScript"):
        read_torch_file(path)


def test_other_zips(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        read_torch_file(tmp_path / "file.npz")


def test_big_endian(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.", {"byteorder": b"big"})
    with pytest.raises(UserError, match="byte order b'big', expected little"):
        read_torch_file(path)


def test_a_list_that_holds_itself_has_no_paths(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02]q\0h\0a.")
    with pytest.raises(UserError, match="holds itself"):
        tensors(read_torch_file(path))
