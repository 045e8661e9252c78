"""Torch files made by hand, and stored tensors read by arithmetic on bytes."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.containers.stored import StoredTensor


def loaded(stored: StoredTensor) -> torch.Tensor:
    """The tensor, each element taken from where offset and strides say."""
    last = sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides, strict=True))
    count = last + 1 if 0 not in stored.shape else 0
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        data = bytearray(file.read(count * stored.dtype.itemsize))
    if not count:
        return torch.empty(stored.shape, dtype=stored.dtype)
    return torch.frombuffer(data, dtype=stored.dtype).as_strided(stored.shape, stored.strides)


def all_loaded(tree: Any) -> Any:
    """The tree with tensors in the places of stored ones."""
    if isinstance(tree, StoredTensor):
        return loaded(tree)
    if isinstance(tree, dict):
        return {key: all_loaded(value) for key, value in tree.items()}
    return type(tree)(all_loaded(value) for value in tree) if type(tree) in (list, tuple) else tree


def write_zip(path: Path, data: bytes, records: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, value in (records or {"data/0": bytes(64)}).items():
            archive.writestr(f"archive/{name}", value)
    return path


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Counted up from 0."""
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


class Namer:
    """Opcodes by hand."""

    def __init__(self) -> None:
        self.data = b"\x80\x04"

    def name(self, module: str, name: str) -> "Namer":
        for text in (module, name):
            self.data += b"\x8c" + bytes([len(text)]) + text.encode()
        return self.add(b"\x93")

    def text(self, text: str) -> "Namer":
        return self.add(b"X" + struct.pack("<I", len(text)) + text.encode())

    def add(self, opcodes: bytes) -> "Namer":
        self.data += opcodes
        return self
