"""The weight files of a Hugging Face directory, read by the libraries that define them: safetensors, torch for .bin."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from llmpipe.errors import UserError


class WeightFiles:
    """Every tensor of a directory by name; one is in memory only while it is used."""

    def __init__(self, path: Path):
        self.path = path
        self.files = _key_files(path)
        self._handles: dict[str, Any] = {}

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self.files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type; UserError if no file has it."""
        handle = self._handle(name)
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored type; nothing is read."""
        handle = self._handle(name)
        return handle[name].dtype if isinstance(handle, dict) else handle.get_slice(name)[:0].dtype

    def shape(self, name: str) -> list[int]:
        """A tensor's sizes; nothing is read."""
        handle = self._handle(name)
        return list(handle[name].shape) if isinstance(handle, dict) else handle.get_slice(name).get_shape()

    def _handle(self, name: str) -> Any:
        """The open file that holds a tensor."""
        if name not in self.files:
            raise UserError(f"{self.path} lacks {name}, which transformers needs: convert it again")
        file = self.files[name]
        if file not in self._handles:
            path = self.path / file
            self._handles[file] = state_dict(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
        return self._handles[file]


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A .bin, mapped into memory, nothing but tensors unpickled."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a file of plain tensors: {error}") from error


# Falcon's first config.json files, of classes that transformers never had: its words for them.
_FIRST = {"n_head": "num_attention_heads", "n_head_kv": "num_kv_heads", "n_layer": "num_hidden_layers"}
_FIRST_KINDS = {"RefinedWeb": True, "RefinedWebModel": False}
"""Each with whether it is the new decoder architecture (40B)."""


def read_config(path: Path) -> Any:
    """transformers' own reading of a directory's config.json."""
    given = json.loads((path / "config.json").read_text())
    if given.get("model_type") not in _FIRST_KINDS:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    renamed: dict[str, Any] = {str(_FIRST.get(key, key)): value for key, value in given.items() if key != "auto_map"}
    new: dict[str, Any] = {"model_type": "falcon", "new_decoder_architecture": _FIRST_KINDS[given["model_type"]]}
    return AutoConfig.for_model(**renamed | new)


def holds_a_model(path: Path) -> bool:
    """Whether config.json and weights of Hugging Face's lie in a directory."""
    try:
        return (path / "config.json").is_file() and bool(_model_files(path))
    except UserError:
        return False


def _key_files(path: Path) -> dict[str, str]:
    """The file of each tensor, by the files' own headers; UserError if the index says otherwise."""
    files: dict[str, str] = {}
    names, index = _model_files(path)
    for file in (path / name for name in names):
        if file.suffix == ".bin":
            files |= dict.fromkeys(state_dict(file), file.name)
            continue
        try:
            with safe_open(file, framework="pt") as handle:
                files |= dict.fromkeys(handle.keys(), file.name)
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}): make it again") from error
    if index:
        listed = index["weight_map"]
        wrong = sorted(name for name in files.keys() | listed.keys() if files.get(name) != listed.get(name))
        if wrong:
            raise UserError(
                f"{path}: the index disagrees with the files: {wrong[0]} is in {files.get(wrong[0], 'none')}, not"
                " where it says"
            )
    return files


def _model_files(path: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The files that an index names, and the index; else the file of the plain name, or the only one.

    Others may lie beside: Mistral's own consolidated.safetensors, an adapter, a trainer's states.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = f"{stem}.{suffix}", path / f"{stem}.{suffix}.index.json"
        table = json.loads(index.read_text()) if index.is_file() else None
        named = sorted(set(table["weight_map"].values())) if table else []
        there = [name for name in named if (path / name).is_file()]
        if (path / single).is_file() and there != named:
            return [single], None
        if table:
            return there, table
        if (path / single).is_file():
            return [single], None
        others = [file.name for file in path.glob(f"*.{suffix}" if stem == "model" else f"{stem}*.{suffix}")]
        if len(others := [name for name in others if not name.startswith(("consolidated", "adapter_model"))]) == 1:
            return others, None
    raise UserError(f"{path} has config.json but no *.safetensors: put the weight files beside it")
