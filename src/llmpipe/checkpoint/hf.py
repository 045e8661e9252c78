"""Hugging Face directories, the checkpoints between the stages: read, written, and copied where nothing changes."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint import tokenizer_files, tokenizer_folder
from llmpipe.checkpoint.blocks import FileSource, same_bytes
from llmpipe.checkpoint.carried import copy_hashed
from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.hf_weights import read_tensors, weight_files
from llmpipe.checkpoint.layouts import Stored, blocks_of, hf_layout
from llmpipe.checkpoint.mover import Filled, Mover, Segments, write_files
from llmpipe.checkpoint.source import TensorSource, check_tensors
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, from_hf_config, is_first_form, to_hf_config
from llmpipe.files import read_json, write_json
from llmpipe.progress import progress

log = logging.getLogger(__name__)

# Buffers that old checkpoints saved and that follow from config.json.
_DERIVED = re.compile(r"(model|transformer)\.((layers|h)\.\d+\.(self_attn|self_attention)\.)?rotary_emb\.inv_freq")


class HfSource(FileSource):
    """A Hugging Face directory: config.json with safetensors or .bin, one file or many with an index."""

    def __init__(self, path: Path):
        shape = from_hf_config(read_json(path / "config.json", safetensors_file.GET_AGAIN), str(path / "config.json"))
        self.family = FAMILIES[shape.family]
        super().__init__(path, shape, self.family.keys(shape))
        self._stored = read_tensors(path)
        self._check()
        for stored in hf_layout(self.family, shape):
            for key, block in blocks_of(stored, self._stored[stored.name]):
                self.add(key, block, self._stored[stored.name].dtype)

    def _check(self) -> None:
        derived = [name for name in self._stored if _DERIVED.fullmatch(name)]
        if derived:
            log.info("%s: ignored, derived from config.json: %s", self.path, ", ".join(derived))
        found = {name: tensor.shape for name, tensor in self._stored.items() if name not in derived}
        outside = {row.name: row.hf for row in self.family.tensors if not row.per_layer}
        head, embedding = outside["head.weight"], outside["embedding.weight"]
        if self.shape.tie_embeddings and head in found:
            if not same_bytes(self._stored[head], self._stored.get(embedding)):
                raise UserError(
                    f"{self.path}: config.json says tie_word_embeddings, but {head} is not {embedding}: set it to false"
                )
            log.info("%s: ignored, tied to the embedding: %s", self.path, head)
            del found[head]
        expected = {stored.name: stored.shape for stored in hf_layout(self.family, self.shape)}
        check_tensors(self.path, expected, found)

    @property
    def is_checkpoint(self) -> bool:
        """Whether its weights can be copied as they are: safetensors under the checkpoint's own names."""
        return all(tensor.file.suffix == ".safetensors" for tensor in self._stored.values())


def write(mover: Mover, directory: Path, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Fill a directory with a source as a checkpoint, all but its manifest; returns the SHA-256 taken while writing.

    `dtype` None keeps each tensor's stored type. A source that already is such a directory is copied.
    """
    source = mover.source
    hashes: dict[str, str | None] = {**write_beside(source, directory, dtype)}
    copied = _is_copied(source, dtype)
    return hashes | (_copy_weights(mover, directory) if copied else _write_weights(mover, directory, dtype))


def write_beside(source: TensorSource, directory: Path, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Everything of a checkpoint but its weights and its manifest; returns the SHA-256 of what is not config.json."""
    hashes = tokenizer_files.complete(source, directory)
    _write_config(source, directory, dtype, _is_copied(source, dtype))
    return hashes


def _is_copied(source: TensorSource, dtype: torch.dtype | None) -> bool:
    same = all(dtype in (None, source.dtype(key)) for key in source.keys())  # noqa: SIM118
    return isinstance(source, HfSource) and source.is_checkpoint and same


def _copy_weights(mover: Mover, directory: Path) -> dict[str, str | None]:
    """The weights as they are, reflinked where the file system can."""
    source = mover.source.path
    chosen = weight_files(source)
    names = dict.fromkeys(chosen.files, "model.safetensors")  # of a file that is alone
    if chosen.index:
        names = {name: name for name in [*chosen.files, chosen.index]}
    total = sum((source / name).stat().st_size for name in names)
    with progress("convert (copy)", total, "B") as shown, ThreadPoolExecutor(1) as beside:
        finite = beside.submit(mover.check_finite, targets(mover.source))
        hashes: dict[str, str | None] = {}
        for name, new in names.items():
            hashes[new] = digest = copy_hashed(source / name, directory / new, shown)
            mover.sources.found(source / name, digest)
        finite.result()
    return hashes


def targets(source: TensorSource, dtype: torch.dtype | None = None) -> dict[str, list[Filled]]:
    """The weight files of a checkpoint and the tensors of each; `dtype` None keeps each tensor's stored type."""
    layout = hf_layout(FAMILIES[source.shape.family], source.shape)
    filled = {stored.name: Filled(stored, dtype or stored_dtype(source, stored)) for stored in layout}
    files = safetensors_file.split({name: tensor.bytes for name, tensor in filled.items()})
    return {file: [filled[name] for name in names] for file, names in files.items()}


def _write_weights(mover: Mover, directory: Path, dtype: torch.dtype | None) -> dict[str, str | None]:
    files = targets(mover.source, dtype)
    total = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
    with progress("convert", total, "B") as shown:
        segments = {directory / name: safetensors_segments(held) for name, held in files.items()}
        hashes = write_files(mover, segments, shown)
    names = {file: [tensor.stored.name for tensor in tensors] for file, tensors in files.items()}
    return {**hashes, **safetensors_file.write_index(directory, names, total)}


def safetensors_segments(tensors: list[Filled], metadata: dict[str, str] | None = None) -> Segments:
    """The header and the tensors of a safetensors file."""
    entries = [safetensors_file.Entry(tensor.stored.name, tensor.dtype, tensor.stored.shape) for tensor in tensors]
    return [safetensors_file.header_bytes(entries, metadata or {"format": "pt"}), *tensors]


def stored_dtype(source: TensorSource, stored: Stored) -> torch.dtype:
    """The type that keeps every part of a stored tensor as it is."""
    types = [source.dtype(key) for key in dict.fromkeys(part.key for part in stored.parts)]
    kept = types[0]
    for dtype in types[1:]:
        kept = torch.promote_types(kept, dtype)
    return kept


def _write_config(source: TensorSource, directory: Path, dtype: torch.dtype | None, copied: bool) -> None:
    """config.json: the source's own where it has one, with the written type; else made from the shape."""
    types = {dtype or source.dtype(key) for key in source.keys()}  # noqa: SIM118
    written = _name(types.pop()) if len(types) == 1 else None
    if not (source.path / "config.json").is_file():
        bos, eos = tokenizer_folder.control_ids(source.tokenizer_place)
        config = to_hf_config(source.shape, written or _name(source.dtype("embedding.weight")), bos, eos)
    else:
        config = read_json(source.path / "config.json", safetensors_file.GET_AGAIN)
        told = from_hf_config(config)
        if is_first_form(config):
            ids = config.get("bos_token_id"), config.get("eos_token_id")
            config = to_hf_config(source.shape, written or _name(source.dtype("embedding.weight")), *ids)
        elif written not in (None, config.get("dtype"), config.get("torch_dtype")) and not copied:
            config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": written}
        config.pop("auto_map", None)  # it names code, which is not carried
        config |= _changed(told, source.shape)
    write_json(directory / "config.json", config)


def _changed(told: Shape, written: Shape) -> dict[str, Any]:
    """What a grown vocabulary or a head of its own, untied by an adapter, changes in a source's config.json."""
    fields = {"vocab": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
    return {
        key: getattr(written, name) for name, key in fields.items() if getattr(written, name) != getattr(told, name)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
