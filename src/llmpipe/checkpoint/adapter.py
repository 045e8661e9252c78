"""LoRA adapters in PEFT's format merged into a source: W + scaling * B @ A, computed in fp64 and rounded once.

What is written in a wider type than the source's is rounded to that one.

An adapter is a directory with adapter_config.json and adapter_model.safetensors (or .bin), whose tensors are named
after Hugging Face's modules, `base_model.model.MODULE.lora_A.weight`, whatever format the source has. Hu et al. 2021
(https://arxiv.org/abs/2106.09685); rsLoRA: https://arxiv.org/abs/2312.03732; DoRA: https://arxiv.org/abs/2402.09353.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.adapter_files import Adapter, Delta, read_adapter
from llmpipe.checkpoint.adapter_tokenizer import hashes_of, place_of
from llmpipe.checkpoint.blocks import Block, OpenFiles, as_rectangle, gather_into, same_bytes, straight
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.layouts import Part, Stored, blocks_of, hf_layout
from llmpipe.checkpoint.source import Slices, TensorSource, resolved, sizes_of
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape
from llmpipe.files import CHUNK_BYTES

log = logging.getLogger(__name__)

EMBEDDING, HEAD = "embedding.weight", "head.weight"


class AdaptedSource:
    """A source with an adapter merged; tensors that the adapter leaves alone are the source's own."""

    def __init__(self, source: TensorSource, directory: Path, written: torch.dtype | None = None):
        """UserError with the list if an adapter's tensor fits nothing in the model.

        `written`: the type that the tensors are going to have; None: the source's.
        """
        self.path, self.source, self._written = source.path, source, written
        self.family = FAMILIES[source.shape.family]
        adapter = read_adapter(directory)
        self.shape = self._shape(adapter)
        self._table = self.family.keys(self.shape)
        layout = {stored.name: stored for stored in hf_layout(self.family, self.shape)}
        _check_fits(adapter, layout)
        self._replaced = _replaced(adapter, layout)
        self._deltas: dict[str, list[tuple[Part, Delta]]] = {}
        for name, delta in adapter.deltas.items():
            for part in layout[name].parts:
                self._deltas.setdefault(part.key, []).append((part, delta))
        self._files = OpenFiles()
        self.tokenizer_place = place_of(source, directory, self.shape.vocab)
        log.info(
            "%s: merged into %d tensors, %d more are its own", directory, len(adapter.deltas), len(adapter.replaced)
        )

    def keys(self) -> list[str]:
        return list(self._table)

    def dtype(self, key: str) -> torch.dtype:
        own = self.source.dtype(self._theirs(key))
        changed = key in self._deltas or key in self._replaced
        return torch.promote_types(own, self._written) if changed and self._written else own

    def blocks(self, key: str) -> list[Block] | None:
        if key in self._deltas:
            return None
        if key not in self._replaced:
            return self.source.blocks(self._theirs(key))
        dtype, blocks = self._replaced[key]
        return blocks if dtype == self.dtype(key) else None

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        wanted = resolved(slices, self._table[key].shape(self.shape))
        rows, cols = as_rectangle(wanted)
        if key not in self._deltas:
            return self._base(key, rows, cols).to(self.dtype(key)).view(sizes_of(wanted))
        whole = torch.empty(sizes_of(wanted), dtype=self.dtype(key))
        at_once = max(1, CHUNK_BYTES // (8 * self._table[key].shape(self.shape)[1]))
        for first in range(rows.start, rows.stop, at_once):
            part = slice(first, min(first + at_once, rows.stop))
            whole[first - rows.start : part.stop - rows.start] = self._merged(key, part, cols)
        return whole

    def _merged(self, key: str, rows: slice, cols: slice) -> torch.Tensor:
        """(rows, columns) in fp64."""
        if all(delta.magnitude is None for _, delta in self._deltas[key]):
            return self._sum(key, rows, cols)
        whole = self._sum(key, rows, slice(0, self._table[key].shape(self.shape)[1]))
        for part, delta in self._deltas[key]:
            if (found := _rows_of(part, rows)) and delta.magnitude is not None:
                ours, stored = found
                scale = self._rectangle(delta.magnitude, stored, slice(0, 1))  # (rows, 1)
                whole[ours] *= scale / whole[ours].norm(dim=1, keepdim=True)
        return whole[:, cols]

    def _sum(self, key: str, rows: slice, cols: slice) -> torch.Tensor:
        """W + scaling * B @ A, (rows, columns) in fp64."""
        whole = self._base(key, rows, cols).double()
        for part, delta in self._deltas[key]:
            if found := _rows_of(part, rows):
                ours, stored = found
                right = slice(part.at_col + cols.start - part.cols.start, part.at_col + cols.stop - part.cols.start)
                b = self._rectangle(delta.left, stored, slice(0, delta.rank))  # (rows, r)
                a = self._rectangle(delta.right, slice(0, delta.rank), right)  # (r, columns)
                whole[ours] += delta.scaling * (b @ a)
        return whole

    def _base(self, key: str, rows: slice, cols: slice) -> torch.Tensor:
        """What the adapter is added to, (rows, columns) in the type it is stored in."""
        if key in self._replaced:
            dtype, blocks = self._replaced[key]
            whole = torch.empty(rows.stop - rows.start, cols.stop - cols.start, dtype=dtype)
            gather_into(whole, blocks, rows, cols, self._files)
            return whole
        theirs = (rows, cols) if len(self._table[key].dims) == 2 else (cols,)
        return self.source.read(self._theirs(key), theirs).view(rows.stop - rows.start, cols.stop - cols.start)

    def _rectangle(self, tensor: StoredTensor, rows: slice, cols: slice) -> torch.Tensor:
        """Part of an adapter's matrix in fp64; rows may have a step."""
        whole = torch.empty(rows.stop - rows.start, cols.stop - cols.start, dtype=tensor.dtype)
        gather_into(whole, [straight(tensor, "")], slice(rows.start, rows.stop), cols, self._files)
        return whole[:: rows.step].double()

    def _theirs(self, key: str) -> str:
        """The source's key: a head that was tied and no longer is starts from the embedding."""
        return EMBEDDING if key == HEAD and self.source.shape.tie_embeddings else key

    def _shape(self, adapter: Adapter) -> Shape:
        """The merged model's: an embedding of the adapter's own may have more rows, a tied head may come apart."""
        shape = self.source.shape
        embedding, head = (self.family.row(key, shape).hf for key in (EMBEDDING, HEAD))
        own = adapter.replaced.get(embedding)
        if own and len(own.shape) != 2:
            raise UserError(f"{adapter.file}: {embedding} is {list(own.shape)}, no matrix: copy the adapter again")
        vocab = own.shape[0] if own else shape.vocab
        if not shape.tie_embeddings or not any(name in adapter.names for name in (embedding, head)):
            return replace(shape, vocab=vocab)
        if own and head not in adapter.names and vocab != shape.vocab:
            _check_saved_once(adapter, embedding)
            return replace(shape, vocab=vocab)  # resized, and saved once for both
        both_whole = not adapter.deltas.keys() & {embedding, head}
        if own and both_whole and same_bytes(own, adapter.replaced.get(head)):
            del adapter.replaced[head]
            return replace(shape, vocab=vocab)
        log.warning("%s: embedding and head were tied; the adapter changes them apart, so they are two", adapter.path)
        return replace(shape, vocab=vocab, tie_embeddings=False)


def _replaced(adapter: Adapter, layout: dict[str, Stored]) -> dict[str, tuple[torch.dtype, list[Block]]]:
    """Tensors of the adapter's own, by our keys."""
    found: dict[str, tuple[torch.dtype, list[Block]]] = {}
    for name, tensor in adapter.replaced.items():
        for key, block in blocks_of(layout[name], tensor):
            found.setdefault(key, (tensor.dtype, []))[1].append(block)
    return found


def _check_saved_once(adapter: Adapter, embedding: str) -> None:
    """UserError if a resized embedding was trained apart from the head: PEFT's head has new rows that no file holds."""
    apart = [str(name) for name in adapter.config.get("modules_to_save") or ()]
    if embedding.removesuffix(".weight").endswith(tuple(apart)):
        raise UserError(
            f"{adapter.file}: {embedding} was resized and trained apart from the head (modules_to_save: {apart}), whose"
            " new rows are not in the adapter: train with lm_head in modules_to_save too, or with"
            " ensure_weight_tying=True"
        )


def _check_fits(adapter: Adapter, layout: dict[str, Stored]) -> None:
    """UserError with every tensor of the adapter that the model has no place for."""
    sizes = {name: tensor.shape for name, tensor in adapter.replaced.items()}
    deltas = {name: (delta.left.shape[0], delta.right.shape[1]) for name, delta in adapter.deltas.items()}
    wrong = [
        f"{name} is {list(size)}, the model's {list(layout[name].shape) if name in layout else 'has none'}"
        for name, size in [*sizes.items(), *deltas.items()]
        if name not in layout or tuple(size) != layout[name].shape
    ]
    if wrong:
        raise UserError(
            f"{adapter.path} does not fit the model: {'; '.join(wrong[:20])}"
            f"{f'; and {len(wrong) - 20} more' if len(wrong) > 20 else ''}: name the weights it was trained on"
        )


def _rows_of(part: Part, rows: slice) -> tuple[slice, slice] | None:
    """Which of our rows, counted from `rows.start`, a part gives, and the stored rows that they are."""
    first, last = max(part.rows.start, rows.start), min(part.rows.stop, rows.stop)
    if first >= last:
        return None
    begin = part.at_row + (first - part.rows.start) * part.step
    stored = slice(begin, begin + (last - first - 1) * part.step + 1, part.step)
    return slice(first - rows.start, last - rows.start), stored


def describe(directory: Path, with_tokenizer: bool) -> dict[str, Any]:
    """An adapter for the manifest: what it says that it was trained on, and the SHA-256 of the files that were used."""
    found = read_adapter(directory).described()
    return found | {"files": found["files"] | (hashes_of(directory) if with_tokenizer else {})}
