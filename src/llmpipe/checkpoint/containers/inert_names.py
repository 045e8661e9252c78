"""What the names in a pickle become: values of an allow-list, stand-ins for foreign ones, refusal for the rest."""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from llmpipe.checkpoint.containers.inert import Damaged, Maker, Refused, StandIn, Table, check_key

# Python's own modules, with those that other versions have.
_PYTHONS = sys.stdlib_module_names | {"__builtin__", "commands", "copy_reg", "cPickle", "distutils", "imp", "popen2"}
# Names of Python's own that training arguments and states hold: inert like the foreign ones.
_HARMLESS = {
    "_io": {"BytesIO"},  # Transformer Engine's _extra_state
    "builtins": {"bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple", "type"},
    "collections": {"deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "functools": {"partial"},
    "signal": {"Signals"},
    "types": {"SimpleNamespace"},
}
_NUMBERS = re.compile(r"[<>|=]?[?bBiufc]\d*")


def find(allowed: dict[tuple[str, str], Any], stand_ins: bool) -> Callable[[str, str], Any]:
    """The `find` of `unpickle`: `allowed` beside the common names; stand-ins for foreign names, if they are wanted."""

    def found(module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        for table in (allowed, COMMON):
            if (module, name) in table:
                return table[module, name]
        if not stand_ins or not _is_inert(module, name):
            raise Refused(f"{module}.{name}")
        return Maker("getattr", _member) if (module, name) == ("builtins", "getattr") else StandIn(f"{module}.{name}")

    return found


def _is_inert(module: str, name: str) -> bool:
    """A foreign name, or one of Python's that states hold; "torch", "serialization.os.system" is neither."""
    if module == "builtins" and name == "getattr":  # Python 3.11's way to write a member of an Enum
        return True
    if module.partition(".")[0] in _PYTHONS:
        return name in _HARMLESS.get(module, ())
    return not any(part in _PYTHONS for part in name.split(".")[:-1])


def _member(owner: Any, name: Any) -> StandIn:
    if isinstance(owner, StandIn) and owner.args is None and isinstance(name, str):
        return StandIn(owner.name, (name,))
    raise Refused("builtins.getattr")


@dataclass(slots=True)
class Dtype:
    """A numpy dtype of numbers, or the code of another, which no value is made of."""

    code: str

    def build(self, state: Any) -> None:
        if isinstance(state, tuple) and state[1:2] in (("<",), (">",)):
            self.code = state[1] + self.code.lstrip("<>|=")

    def numbers(self) -> np.dtype[Any]:
        if not _NUMBERS.fullmatch(self.code):
            raise Damaged(f"a numpy {self.code}, expected numbers")
        return np.dtype(self.code)


@dataclass(slots=True)
class Array:
    """A numpy array that nothing was made of yet."""

    dtype: Dtype | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: Any = b""

    def build(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def numpy(self) -> np.ndarray[Any, Any]:
        """The array; Damaged if it is not made of numbers."""
        if not isinstance(self.dtype, Dtype):
            raise Damaged("a numpy array without a dtype")
        flat = np.frombuffer(_raw(self.data), self.dtype.numbers())
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def _raw(data: Any) -> bytes:
    """Python 2 wrote bytes as text."""
    if isinstance(data, str):
        return data.encode("latin-1")
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    raise Damaged(f"a {type(data).__name__} in the place of bytes")


def _dtype(code: Any, *_: Any) -> Dtype:
    return Dtype(code if isinstance(code, str) else "O")


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, Dtype):
        raise Damaged("a numpy number without a dtype")
    (value,) = np.frombuffer(_raw(data), dtype.numbers()).tolist()
    return value


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    return Array(dtype, shape, order == "F", data)


def _namespace(*args: Any) -> Namespace:
    if args:
        raise Damaged("a Namespace with arguments")
    return Namespace()


def _table(items: Any = (), *_: Any) -> Table:
    table = Table()
    for key, value in items.items() if isinstance(items, dict) else items if isinstance(items, list) else ():
        check_key(key)
        table[key] = value
    return table


def _set(values: Any = (), *_: Any) -> set[Any]:
    for value in values:
        check_key(value)
    return set(values)


def _encoded(text: Any = "", encoding: Any = "latin1", *_: Any) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin-1")
    raise Damaged("bytes that are no latin-1 text")


def _path(*parts: Any) -> PurePosixPath:
    return PurePosixPath(*(part for part in parts if isinstance(part, str)))


COMMON: dict[tuple[str, str], Any] = {
    (module, name): Maker(f"{module}.{name}", make)
    for modules, name, make in (
        (("collections",), "OrderedDict", _table),
        (("collections",), "Counter", _table),
        (("collections",), "defaultdict", lambda *args: _table(*args[1:])),
        (("argparse",), "Namespace", _namespace),
        (("builtins",), "set", _set),
        (("builtins",), "frozenset", lambda *args: frozenset(_set(*args))),
        (("builtins",), "bytearray", lambda text="", *rest: bytearray(_raw(text))),
        (("builtins",), "complex", lambda real=0.0, imag=0.0: complex(float(real), float(imag))),
        (("_codecs",), "encode", _encoded),
        (("pathlib", "pathlib._local"), "PosixPath", _path),
        (("pathlib", "pathlib._local"), "PurePosixPath", _path),
        (("pathlib", "pathlib._local"), "WindowsPath", _path),
        (("numpy",), "dtype", _dtype),
        (("numpy",), "ndarray", lambda: Array()),
        (("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct", lambda *_: Array()),
        (("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
        (("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer", _from_buffer),
    )
    for module in modules
}
