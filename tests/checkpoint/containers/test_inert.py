"""Crafted pickles inside torch files: nothing runs, nothing crashes, and the error names what was asked for."""

import os
import pathlib
import pickle
import struct
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_files import Namer, filled, write_zip

from llmpipe.checkpoint.containers.inert import StandIn
from llmpipe.checkpoint.containers.torch_file import read_torch_file
from llmpipe.errors import UserError

_heard: list[str] | None = None


def _hear(event: str, _: Any) -> None:
    """Hooks of Python cannot be taken off again: this one listens while a test wants it."""
    if _heard is not None and event not in ("object.__getattr__", "sys._getframe"):
        _heard.append(event)


sys.addaudithook(_hear)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What Python's own audit reports: files opened, modules imported, code compiled, processes started."""
    global _heard
    _heard = []
    yield _heard
    _heard = None


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any):
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


def from_type(canary: str) -> Any:
    return Calls(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {canary}",), {})


def numpy_objects(canary: str) -> Any:
    return np.array([Calls(os.system, f"touch {canary}")], dtype=object)


ATTACKS: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda canary: Calls(os.system, f"touch {canary}"), r"posix\.system"),
    "eval": (lambda canary: Calls(eval, f"open({canary!r}, 'w')"), r"builtins\.eval"),
    "exec in a table": (lambda canary: {"a": [Calls(exec, f"open({canary!r}, 'w')")]}, r"builtins\.exec"),
    "open": (lambda canary: Calls(open, canary, "w"), r"_?io\.open"),
    "import": (lambda canary: Calls(__import__, "os"), r"builtins\.__import__"),
    "getattr of a module": (lambda canary: Calls(getattr, Calls(__import__, "os"), "system"), r"builtins\."),
    "touch": (lambda canary: Calls(pathlib.Path.touch, pathlib.Path(canary)), r"pathlib|builtins\.getattr"),
    "rebuild from type": (from_type, r"posix\.system"),
    "numpy objects": (numpy_objects, r"posix\.system"),
    "pickle in a pickle": (lambda canary: Calls(pickle.loads, b"."), r"_?pickle\.loads"),
}


@pytest.mark.parametrize("stand_ins", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_runs_and_the_error_names_it(tmp_path: Path, events: list[str], name: str, stand_ins: bool) -> None:
    make, asked = ATTACKS[name]
    canary = tmp_path / "canary"
    path = tmp_path / "file.pt"
    torch.save({"weight": filled(2), "bad": make(str(canary))}, path)
    events.clear()
    with pytest.raises(UserError, match=f"is refused: it asks for {asked}") as caught:
        read_torch_file(path, stand_ins)
    assert set(events) == {"open"}  # of the file itself
    assert str(path) in str(caught.value)
    assert not canary.exists()


BY_HAND = {
    "torch.load": (Namer().name("torch", "load").text("/etc/passwd").add(b"\x85R."), r"torch\.load"),
    "torch.hub": (Namer().name("torch.hub", "load").text("x").add(b"\x85R."), r"torch\.hub\.load"),
    "a chain": (Namer().name("torch", "serialization.os.system").text("x").add(b"\x85R."), r"os\.system"),
    "numpy's own": (Namer().name("numpy", "load").text("x").add(b"\x85R."), r"numpy\.load"),
    "Python 2's": (Namer().name("__builtin__", "eval").text("1").add(b"\x85R."), r"builtins\.eval"),
    "a storage's method": (Namer().name("torch.storage", "_load_from_bytes").add(b"C\0\x85R."), "_load_from_bytes"),
    "a call of a value": (Namer().text("x").add(b")R."), "a call of str"),
    "a call of a dtype": (Namer().name("torch", "float32").add(b")R."), "a call of dtype"),
    "a state for a class": (Namer().name("torch._utils", "_rebuild_tensor_v2").add(b"}b."), "a state for a Maker"),
    "a state for a table": (Namer().add(b"}}b."), "a state for a dict"),
}  # fmt: skip
INERT_WITH_STAND_INS = ("torch.load", "torch.hub", "numpy's own", "a storage's method")


@pytest.mark.parametrize("name", BY_HAND)
def test_names_by_hand(tmp_path: Path, name: str) -> None:
    code, asked = BY_HAND[name]
    path = write_zip(tmp_path / "file.pt", code.data)
    with pytest.raises(UserError, match=f"refused: it asks for .*{asked}"):
        read_torch_file(path)
    if name in INERT_WITH_STAND_INS:
        assert isinstance(read_torch_file(path, stand_ins=True), StandIn)
    else:
        with pytest.raises(UserError, match=f"refused: it asks for .*{asked}"):
            read_torch_file(path, stand_ins=True)


def test_a_stand_in_cannot_be_called_twice(tmp_path: Path) -> None:
    code = Namer().name("a", "b").add(b")R)R.")
    with pytest.raises(UserError, match=r"a call of a\.b"):
        read_torch_file(write_zip(tmp_path / "file.pt", code.data), stand_ins=True)


def test_classes_of_tensors_are_not_called(tmp_path: Path) -> None:
    code = Namer().name("torch", "Tensor").add(b"K\x05\x85R.")
    with pytest.raises(UserError, match=r"a call of torch\.Tensor"):
        read_torch_file(write_zip(tmp_path / "file.pt", code.data), stand_ins=True)


def test_attributes_do_not_stay_behind(tmp_path: Path) -> None:
    """What one file does to a shared object would be seen by the next."""
    code = Namer().name("argparse", "Namespace").add(b")\x81}").text("build").add(b"K\x01sb.")
    assert vars(read_torch_file(write_zip(tmp_path / "file.pt", code.data))) == {"build": 1}
    assert not hasattr(Namespace(), "build")


def test_a_member_of_an_enum_by_its_name(tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3 write it."""
    code = Namer().name("builtins", "getattr").name("megatron.core.enums", "ModelType").text("encoder").add(b"\x86R.")
    path = write_zip(tmp_path / "file.pt", code.data)
    found = read_torch_file(path, stand_ins=True)
    assert (found.name, found.args) == ("megatron.core.enums.ModelType", ("encoder",))
    with pytest.raises(UserError, match=r"builtins\.getattr"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.", "in the place of a key"),  # Python itself would crash
        (b"\x80\x02})" + b"2\x86" * 40 + b"K\x01s.", "in the place of a key"),  # 2**40 parts
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "expected"),  # BINBYTES8
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.", "expected"),  # BYTEARRAY8
        (b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"x.", "expected"),
        (b"\x80\x02]r\xff\xff\xff\xff.", None),  # Python's own memo would take 64 GB
        (b"\x80\x02K\x01", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02tR.", "damaged"),
        (b"\x80\x02h\x05.", "memo holds no value 5"),
        (b"\x80\x02(0.", "damaged"),
        (b"\x80\x06].", "protocol 6"),
        (b"I1\n.", "not one that torch.save writes"),
        (b"\x80\x02\x82\x01.", "not one that torch.save writes"),  # the extension registry
        (b"\x80\x02cbuiltins\nset\n](K\x01]e\x85R.", "in the place of a key"),
        (b"\x80\x04(]\x91.", "in the place of a key"),
        (b"\x80\x04\x8f(]\x90.", "in the place of a key"),
        (b"\x80\x02K\x01]a.", "appends to a int"),
        (b"\x80\x02](K\x01K\x02u.", "sets an item of a list"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02}Q.", "damaged"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x7f\x85R.", "in the place of bytes"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.", "no latin-1 text"),
        (b"", "damaged"),
    ],
)
def test_bombs_and_nonsense(tmp_path: Path, data: bytes, message: str | None) -> None:
    path = write_zip(tmp_path / "file.pt", data)
    if message is None:
        assert read_torch_file(path) == []
        return
    with pytest.raises(UserError, match=message):
        read_torch_file(path)
