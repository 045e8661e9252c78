"""YAML read into frozen dataclasses, strictly."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from llmpipe.errors import UserError, nearest

T = TypeVar("T")


class _Strict(yaml.SafeLoader):
    """Of a key that stands there twice YAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the key {name} stands there twice, line {node.start_mark.line + 1} on: leave one out")
        return super().construct_mapping(node, deep)


def load(kind: type[T], path: Path) -> T:
    """Read one YAML file as `kind`; UserError for a missing file, an unknown or missing key, a wrong type."""
    if not path.is_file():
        beside = sorted(other.stem for other in path.parent.glob("*.yaml"))
        raise UserError(f"{path} is missing: {nearest(path.stem, beside) if beside else 'write it'}")
    try:
        return build(kind, yaml.load(path.read_text(), _Strict), "")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def build(kind: Any, value: Any, where: str) -> Any:
    """The value as the type says, checked all the way down; `where` is the dotted key for the error."""
    if is_dataclass(kind):
        return build_dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        fitting = (kind for kind in arguments if isinstance(value, get_origin(kind) or kind))
        return build(next(fitting, arguments[0]), value, where)
    if origin is Literal:
        if value is False and "off" in arguments:  # YAML 1.1 reads off as false
            return "off"
        if value not in arguments:
            raise UserError(f"{where} is {value!r}: {nearest(str(value), map(str, arguments))}")
        return value
    if origin is list:
        expect(value, list, where)
        return [build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        expect(value, dict, where)
        return {str(key): build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        return build_float(value, where)
    expect(value, kind, where)
    return value


def build_dataclass(kind: Any, value: Any, where: str) -> Any:
    expect(value, dict, where)
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in known:
            raise UserError(f"unknown key {prefix}{key}: {nearest(str(key), known)}")
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"the key {prefix}{name} is missing")
    return kind(**{key: build(hints[key], item, prefix + key) for key, item in value.items()})


def build_float(value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-5, which has no dot, as a string
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} is {value!r}, but has to be a number")
    return float(value)


def expect(value: Any, kind: type, where: str) -> None:
    words = {dict: "a mapping of keys", list: "a list", int: "a whole number", str: "a text", bool: "true or false"}
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where or 'the file'} is {value!r}, but has to be {words[kind]}")
