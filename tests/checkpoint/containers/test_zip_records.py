"""Archives that are cut, patched or flipped: always the user's error, never another tensor."""

import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch_files import all_loaded, filled, write_zip

from llmpipe.checkpoint.containers.torch_file import read_torch_file
from llmpipe.errors import UserError


@pytest.mark.parametrize("kept", [0, 3, 100, 1000, -30, -1])
def test_truncated(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": filled(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"truncated|damaged"):
        read_torch_file(path)


def test_compressed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        read_torch_file(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_comes_twice(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(64))
    with pytest.raises(UserError, match="archive/data/0 comes twice"):
        read_torch_file(path)


def patched(path: Path, find: bytes, at: int, value: bytes) -> None:
    """Bytes written at a place counted from where some others stand."""
    data = bytearray(path.read_bytes())
    start = data.index(find) + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


CENTRAL = b"PK\1\2"


def test_records_that_overlap(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.")
    patched(path, CENTRAL, 20, struct.pack("<II", 40, 40))  # data.pkl's sizes
    with pytest.raises(UserError, match=r"archive/data.pkl ends at byte \d+, after"):
        read_torch_file(path)


def test_a_record_whose_place_is_another(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.")
    with zipfile.ZipFile(path) as archive:
        other = archive.getinfo("archive/data/0").header_offset
    patched(path, CENTRAL, 42, struct.pack("<I", other))
    with pytest.raises(UserError, match="is not where the table of contents says"):
        read_torch_file(path)


def test_a_record_outside_the_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.")
    patched(path, CENTRAL, 42, struct.pack("<I", 1 << 30))
    with pytest.raises(UserError, match="damaged"):
        read_torch_file(path)


def test_every_flipped_byte_of_the_directory_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Never another exception than the user's, never another tensor."""
    path = tmp_path / "file.pt"
    torch.save({"a": filled(3, 5), "b": filled(4, dtype=torch.bfloat16)}, path)
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(400):
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
        try:
            all_loaded(read_torch_file(path, stand_ins=rng.random() < 0.5))
        except UserError as error:
            assert str(path) in str(error)


def test_an_empty_archive(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pt", b"\x80\x02}.")
    data = path.read_bytes()
    end = len(data) - 22
    path.write_bytes(data[:end] + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, 0, end, 0))
    with pytest.raises(UserError, match="an archive in it is empty"):
        read_torch_file(path)
