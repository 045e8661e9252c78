"""safetensors files, read back with safetensors' own library."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.errors import UserError

TENSORS = {
    "b": torch.randn(3, 5, dtype=torch.float32),
    "a": torch.randn(7, 2).to(torch.bfloat16),
    "half": torch.randn(4).to(torch.float16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "bytes": torch.arange(11, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
}


def entries(tensors: dict[str, torch.Tensor]) -> list[safetensors_file.Entry]:
    return [safetensors_file.Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_file_is_read_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = safetensors_file.write_file(path, entries(TENSORS), TENSORS.__getitem__, {"format": "pt", "tp": "2"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "tp": "2"}
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    safetensors_file.write_file(path, entries({"w": tensor}), lambda _: tensor, {})
    header = b'{"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}'
    header += b" " * (-len(header) % 8)
    # bfloat16: 1.0 is 0x3f80, -2.0 is 0xc000, little endian
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + bytes([0x80, 0x3F, 0x00, 0xC0])


def test_tensors_are_asked_for_one_at_a_time_and_cast(tmp_path: Path) -> None:
    asked = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((2, 3), 1.0 + 2**-12).T  # not contiguous, not bfloat16

    wanted = [safetensors_file.Entry(name, torch.bfloat16, (3, 2)) for name in ("z", "a")]
    safetensors_file.write_file(tmp_path / "x.safetensors", wanted, read, {})
    assert asked == ["z", "a"]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(3, 2, dtype=torch.bfloat16))


def test_model_in_one_file_or_in_numbered_files_with_an_index(tmp_path: Path) -> None:
    sizes = {f"t{i}": 40 for i in range(5)} | {"large": 400}
    assert safetensors_file.split(sizes) == {"model.safetensors": list(sizes)}
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    files = safetensors_file.split(sizes, max_file_bytes=90)
    assert files == {names[0]: ["t0", "t1"], names[1]: ["t2", "t3"], names[2]: ["t4"], names[3]: ["large"]}
    hashes = safetensors_file.write_index(tmp_path, files, 600)
    index = tmp_path / "model.safetensors.index.json"
    assert hashes == {index.name: hashlib.sha256(index.read_bytes()).hexdigest()}
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 600},
        "weight_map": {
            "t0": names[0], "t1": names[0], "t2": names[1], "t3": names[1], "t4": names[2], "large": names[3],
        },
    }  # fmt: skip
    assert safetensors_file.write_index(tmp_path, {"model.safetensors": list(sizes)}, 600) == {}


def test_header_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", {"k": "v"})
    found, metadata = safetensors_file.read_header(tmp_path / "x.safetensors")
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()
    }
    assert metadata == {"k": "v"}


def test_truncated_file_is_named_with_bytes_found_and_expected(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    message = f"{path} is truncated: {size - 3} bytes found, {size} expected: copy or download it again"
    with pytest.raises(UserError, match=re.escape(message)):
        safetensors_file.read_header(path)


@pytest.mark.parametrize(("data", "message"), [
    (b"", "is truncated or not safetensors: its header says that it is 0 bytes long, but the file has 0 bytes"),
    (b"\xff" * 20, "is truncated or not safetensors: its header says that it is 18446744073709551615 bytes long, but"),
    (b"\x02" + b"\0" * 7 + b"[[", "is not safetensors, its header is not JSON (Expecting value"),
    (b"\x01" + b"\0" * 7 + b"3", "is not safetensors, its header is not JSON ('int' object is not iterable)"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{path} {message}")):
        safetensors_file.read_header(path)


def test_unknown_type_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: the tensor w is of type F8_E4M3; llmpipe reads F64, F32"):
        safetensors_file.read_header(tmp_path / "x.safetensors")
