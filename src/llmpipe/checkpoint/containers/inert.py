"""Pickles read without running anything (design decision 6): an interpreter of opcodes that knows only inert values.

Python's own Unpickler can be held back by `find_class`, but not from hashing a tuple nested a million deep (a crash of
the process) nor from a memo of 64 GB that one opcode asks for; it also calls methods of whatever stands on its stack.
Here `pickletools` decodes, each length checked against the bytes that are there, and a name becomes what `find` says.
"""

import pickletools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_KEY_PARTS = 1000


class Refused(Exception):
    """What a pickle asks for and does not get: a dotted name, or a call."""


class Damaged(ValueError):
    """A pickle that its own rules do not allow."""


@dataclass(frozen=True, slots=True)
class Maker:
    """An allowed name that makes a value; it checks its arguments itself."""

    name: str
    make: Callable[..., Any]


@dataclass(eq=False, slots=True)
class StandIn:
    """In place of a foreign name (`args` is None) or of what calling it would make: nothing is called, all is kept."""

    name: str
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)  # its attributes; a state of another kind is under ""
    entries: list[Any] = field(default_factory=list)  # what was appended or added, and (key, value) of what was set

    def build(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):  # (__dict__, slots)
            if isinstance(part, dict):
                self.state.update(part)
            elif part is not None:
                self.state[""] = state


class Table(dict[Any, Any]):
    """An OrderedDict's items; its attributes (a state_dict's `_metadata`) are left out."""

    def build(self, state: Any) -> None:
        del state


def unpickle(data: bytes, find: Callable[[str, str], Any], storage: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle of protocol 2 to 5 describes.

    `find(module, name)` gives the inert value of a name, `storage(id)` that of a persistent id. Raises Refused and
    Damaged.
    """
    machine = _Machine(find, storage)
    run = machine.handlers()
    try:
        for opcode, arg, _ in pickletools.genops(data):
            run[opcode.name](arg)
        (value,) = machine.stack
    except KeyError as error:
        raise Damaged(f"the opcode {error} is not one that torch.save writes") from error
    except (IndexError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, Damaged) else Damaged(str(error)) from error
    return value


def check_key(key: Any) -> None:
    """Damaged for what cannot be a key, or would be hashed without an end: tuples can be nested and shared."""
    parts = [key]
    for part in parts:  # grows
        if isinstance(part, tuple) and len(parts) + len(part) <= _KEY_PARTS:
            parts.extend(part)
        elif isinstance(part, tuple | list | dict | set | bytearray):
            raise Damaged(f"a {type(part).__name__} in the place of a key")


class _Machine:
    """The stack, the marks and the memo; one method for each opcode that is not a plain value."""

    def __init__(self, find: Callable[[str, str], Any], storage: Callable[[Any], Any] | None):
        self.find, self.storage = find, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def handlers(self) -> dict[str, Callable[[Any], None]]:
        table: dict[str, Callable[[Any], None]] = dict.fromkeys(_LITERALS, self.stack.append)
        for name, value in _CONSTANTS.items():
            table[name] = lambda _, value=value: self.stack.append(value)
        table |= {name: getattr(self, name) for name in dir(self) if name.isupper()}
        return table | {"FRAME": self.nothing, "STOP": self.nothing}

    def nothing(self, arg: Any) -> None:
        """Frames only matter to a reader of streams."""

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise Damaged("a value is taken from below a mark")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def PROTO(self, version: int) -> None:
        if not 2 <= version <= 5:
            raise Damaged(f"protocol {version}, expected 2 to 5")

    def MARK(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def POP(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def POP_MARK(self, _: Any) -> None:
        self.pop_mark()

    def DUP(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def BINPUT(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    LONG_BINPUT = BINPUT

    def MEMOIZE(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def BINGET(self, index: int) -> None:
        if index not in self.memo:
            raise Damaged(f"the memo holds no value {index}")
        self.stack.append(self.memo[index])

    LONG_BINGET = BINGET

    def EMPTY_LIST(self, _: Any) -> None:
        self.stack.append([])

    def EMPTY_DICT(self, _: Any) -> None:
        self.stack.append({})

    def EMPTY_SET(self, _: Any) -> None:
        self.stack.append(set())

    def EMPTY_TUPLE(self, _: Any) -> None:
        self.stack.append(())

    def TUPLE(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def TUPLE1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def TUPLE2(self, _: Any) -> None:
        last = self.pop()
        self.stack.append((self.pop(), last))

    def TUPLE3(self, _: Any) -> None:
        last, middle = self.pop(), self.pop()
        self.stack.append((self.pop(), middle, last))

    def FROZENSET(self, _: Any) -> None:
        values = self.pop_mark()
        for value in values:
            check_key(value)
        self.stack.append(frozenset(values))

    def APPEND(self, _: Any) -> None:
        value = self.pop()
        self._extend([value])

    def APPENDS(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target = target.entries
        if type(target) is not list:
            raise Damaged(f"appends to a {type(target).__name__}")
        target.extend(values)

    def ADDITEMS(self, _: Any) -> None:
        values = self.pop_mark()
        if isinstance(self.stack[-1], StandIn):
            self._extend(values)
        elif isinstance(self.stack[-1], set):
            for value in values:
                check_key(value)
            self.stack[-1].update(values)
        else:
            raise Damaged(f"adds to a {type(self.stack[-1]).__name__}")

    def SETITEM(self, _: Any) -> None:
        value = self.pop()
        self._set([self.pop(), value])

    def SETITEMS(self, _: Any) -> None:
        self._set(self.pop_mark())

    def _set(self, flat: list[Any]) -> None:
        """`flat` is key, value, key, value, ..."""
        target, pairs = self.stack[-1], list(zip(flat[::2], flat[1::2], strict=True))
        if isinstance(target, StandIn):
            target.entries.extend(pairs)
        elif isinstance(target, dict):
            for key, value in pairs:
                check_key(key)
                target[key] = value
        else:
            raise Damaged(f"sets an item of a {type(target).__name__}")

    def GLOBAL(self, name: str) -> None:
        self.stack.append(self.find(*name.split(" ", 1)))

    def STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("a name that is no text")
        self.stack.append(self.find(module, name))

    def REDUCE(self, _: Any) -> None:
        args = self.pop()
        self.stack.append(called(self.pop(), args))

    NEWOBJ = REDUCE

    def NEWOBJ_EX(self, _: Any) -> None:
        kwargs, args = self.pop(), self.pop()
        self.stack.append(called(self.pop(), args, kwargs))

    def BUILD(self, _: Any) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Namespace) and isinstance(state, dict) and all(isinstance(key, str) for key in state):
            vars(target).update(state)
        elif callable(build := getattr(target, "build", None)):
            build(state)
        else:
            raise Refused(f"a state for a {type(target).__name__}")

    def BINPERSID(self, _: Any) -> None:
        if self.storage is None:
            raise Damaged("a storage outside of a torch file")
        self.stack.append(self.storage(self.pop()))


def called(target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """A name with its arguments: the value that an allowed one makes, or a stand-in; nothing else can be called."""
    if not isinstance(args, tuple):
        raise Damaged(f"arguments that are a {type(args).__name__}")
    if isinstance(target, Maker) and not kwargs:
        return target.make(*args)
    if isinstance(target, StandIn) and target.args is None:
        return StandIn(target.name, args, kwargs or {})
    raise Refused(f"a call of {getattr(target, 'name', type(target).__name__)}")
