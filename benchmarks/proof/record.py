"""What a converter wrote, as docs/proof keeps it: every file's tensors by dotted key, and its other values in words."""

import json
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import digest


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dicts by dotted key (a key that holds dots stays as it is); empty dicts are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def describe(tensor: torch.Tensor) -> dict[str, object]:
    """A tensor's entry."""
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": digest(tensor),
    }


def tensors(tree: object) -> dict[str, object]:
    """Every tensor of a pickled object."""
    return {key: describe(value) for key, value in flat(tree).items() if isinstance(value, torch.Tensor)}


def others(tree: object) -> dict[str, object]:
    """Everything that is no tensor; a namespace's fields stand below its key, a list's elements are in words."""
    found = {}
    for key, value in flat(tree).items():
        if isinstance(value, Namespace | SimpleNamespace):
            found |= {f"{key} ({type(value).__name__}).{name}": plain(field) for name, field in vars(value).items()}
        elif not isinstance(value, torch.Tensor):
            found[key] = plain(value)
    return found


def plain(value: object) -> object:
    """What JSON can say as it is; the rest in Python's words."""
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def directory(root: Path, suffixes: tuple[str, ...] = (".pt", ".pth", ".bin")) -> dict[str, dict[str, object]]:
    """Each pickled file below a directory, by its path from there: {"files": tensors, "others": everything else}.

    "others" is told once, under "*", where all files have the same.
    """
    found: dict[str, dict[str, object]] = {"files": {}, "others": {}}
    for path in sorted(path for path in root.rglob("*") if path.suffix in suffixes):
        # The files are the originals' own, written a moment ago on this machine.
        tree = torch.load(path, map_location="cpu", weights_only=False)
        name = path.relative_to(root).as_posix()
        found["files"][name] = tensors(tree)
        found["others"][name] = others(tree)
    values = list(found["others"].values())
    if values and all(value == values[0] for value in values):
        found["others"] = {"*": values[0]}
    return found


def differing(files: dict[str, dict[str, object]], source: dict[str, dict[str, object]]) -> dict[str, object]:
    """The tensors that differ from those of a source, where files go back to it, and how many are the same."""
    same, found = 0, {}
    for name, entries in files.items():
        other = {key: entry for key, entry in entries.items() if source.get(name, {}).get(key) != entry}
        same += len(entries) - len(other)
        found[name] = other
    return {"same_as_source": same, "files": found}


def commit(checkout: Path) -> str:
    """The commit of a checkout, or of a bare git directory."""
    return subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def write(path: Path, record: dict[str, object]) -> None:
    """A record of docs/proof, one tensor per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(record, 0) + "\n")


def _lines(value: object, depth: int) -> str:
    small = json.dumps(value)
    if not isinstance(value, dict | list) or len(small) < 190 - 2 * depth or not value:
        return small
    space = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        inside = (f"{json.dumps(name)}: {_lines(child, depth + 1)}" for name, child in value.items())
        return "{" + space + f",{space}".join(inside) + "\n" + " " * depth + "}"
    return "[" + space + f",{space}".join(_lines(child, depth + 1) for child in value) + "\n" + " " * depth + "]"
