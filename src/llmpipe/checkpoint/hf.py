"""Hugging Face directories, the checkpoints between the stages: read, written, and copied where nothing changes."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmpipe.checkpoint import stream, tokenizer_files
from llmpipe.checkpoint.carried import carried_files, copy_hashed
from llmpipe.checkpoint.source import Slices, TensorSource, check_tensors
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, from_hf_config, to_hf_config
from llmpipe.files import read_json, write_json
from llmpipe.progress import progress

log = logging.getLogger(__name__)

# Buffers that old checkpoints saved and that follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def weight_files(directory: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a directory, each with the tensors that the index gives it; None without an index."""
    if (directory / stream.INDEX).is_file():
        index = read_json(directory / stream.INDEX, stream.GET_AGAIN)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise UserError(f"{directory / stream.INDEX} has no weight_map: copy or download it again")
        files: dict[str, list[str] | None] = {}
        for name, file in index["weight_map"].items():
            names = files.setdefault(file, [])
            assert names is not None
            names.append(name)
        return files
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"{directory} holds {', '.join(found)} and no {stream.INDEX} that says which of them make the model"
        )
    return {found[0]: None}


class HfSource:
    """A Hugging Face directory with a config.json and safetensors, one file or many with an index."""

    def __init__(self, path: Path):
        self.path = path
        self.shape: Shape = from_hf_config(read_json(path / "config.json", stream.GET_AGAIN), str(path / "config.json"))
        self._family = FAMILIES[self.shape.family]
        self._table = self._family.keys(self.shape)
        self._entries, self._file_of = _headers(path)
        self._open: dict[str, Any] = {}
        self._check()

    def _check(self) -> None:
        derived = [name for name in self._entries if _DERIVED.fullmatch(name)]
        if derived:
            log.info("%s: ignored, derived from config.json: %s", self.path, ", ".join(derived))
        found = {name: entry.shape for name, entry in self._entries.items() if name not in derived}
        head = self._family.hf_name("head.weight", self.shape)
        if self.shape.tie_embeddings and head in found:
            embedding = self._family.hf_name("embedding.weight", self.shape)
            if not torch.equal(self._view(head)[:], self._view(embedding)[:]):
                raise UserError(
                    f"{self.path}: config.json says tie_word_embeddings, but {head} is not {embedding}: set it to false"
                )
            log.info("%s: ignored, tied to the embedding: %s", self.path, head)
            del found[head]
        check_tensors(
            self.path,
            {self._family.hf_name(key, self.shape): t.shape(self.shape) for key, t in self._table.items()},
            found,
        )

    def keys(self) -> list[str]:
        return list(self._table)

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[self._family.hf_name(key, self.shape)].dtype

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        view = self._view(self._family.hf_name(key, self.shape))
        part = view[slices] if slices else view[:]
        return part.clone(memory_format=torch.contiguous_format)  # the view is of the mapped file

    def _view(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file].get_slice(name)


def _headers(directory: Path) -> tuple[dict[str, stream.Entry], dict[str, str]]:
    """Every tensor of the directory, and the file that each lies in; the index has to agree with the files."""
    entries: dict[str, stream.Entry] = {}
    file_of: dict[str, str] = {}
    for file, listed in weight_files(directory).items():
        path = directory / file
        if not path.is_file():
            raise UserError(f"{path} is missing, but {stream.INDEX} lists it: copy or download it again")
        header, _ = stream.read_header(path)
        if listed is not None and set(listed) != set(header):
            unlike = sorted(set(listed) ^ set(header))
            raise UserError(
                f"{path} and {stream.INDEX} disagree on {', '.join(unlike[:8])}: copy or download both again"
            )
        entries |= header
        file_of |= dict.fromkeys(header, file)
    return entries, file_of


def write(source: TensorSource, directory: Path, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Fill a directory with the source as a checkpoint, all but its manifest; returns the SHA-256 taken while writing.

    `dtype` None keeps each tensor's stored type. A source that already is such a directory is copied.
    """
    hashes = carried_files(source.path, directory) | tokenizer_files.complete(source, directory)
    copied = isinstance(source, HfSource) and all(dtype in (None, source.dtype(key)) for key in source.keys())  # noqa: SIM118
    _write_config(source, directory, dtype, copied)
    return hashes | (_copy_weights(source.path, directory) if copied else _write_weights(source, directory, dtype))


def _copy_weights(source: Path, directory: Path) -> dict[str, str]:
    """The weights as they are, reflinked where the file system can."""
    files = weight_files(source)
    names = {name: name for name in files} if None not in files.values() else dict.fromkeys(files, "model.safetensors")
    if (source / stream.INDEX).is_file():
        names[stream.INDEX] = stream.INDEX
    with progress("convert (copy)", sum((source / name).stat().st_size for name in names), "B") as shown:
        return {new: copy_hashed(source / name, directory / new, shown) for name, new in names.items()}


def _write_weights(source: TensorSource, directory: Path, dtype: torch.dtype | None) -> dict[str, str]:
    family = FAMILIES[source.shape.family]
    table = family.keys(source.shape)
    ours = {family.hf_name(key, source.shape): key for key in table}
    entries = [
        stream.Entry(name, dtype or source.dtype(key), table[key].shape(source.shape)) for name, key in ours.items()
    ]
    with progress("convert", sum(entry.bytes for entry in entries), "B") as shown:
        return stream.write_model(directory, entries, lambda name: source.read(ours[name]), shown=shown)


def _write_config(source: TensorSource, directory: Path, dtype: torch.dtype | None, copied: bool) -> None:
    """config.json: the source's own where it has one, with the written type; else made from the shape."""
    types = {dtype or source.dtype(key) for key in source.keys()}  # noqa: SIM118
    written = _name(types.pop()) if len(types) == 1 else None
    if (source.path / "config.json").is_file():
        config = read_json(source.path / "config.json", stream.GET_AGAIN)
        if written not in (None, config.get("dtype"), config.get("torch_dtype")) and not copied:
            config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": written}
    else:
        bos, eos = tokenizer_files.control_ids(source.path)
        config = to_hf_config(source.shape, written or _name(source.dtype("embedding.weight")), bos, eos)
    write_json(directory / "config.json", config)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
