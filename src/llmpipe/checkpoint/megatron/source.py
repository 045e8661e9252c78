"""Megatron directories of any dialect, read."""

import logging
import re
from pathlib import Path

import torch

from llmpipe.checkpoint.blocks import Block, FileSource, same_bytes
from llmpipe.checkpoint.layouts import blocks_of
from llmpipe.checkpoint.megatron.dialect import Dialect
from llmpipe.checkpoint.megatron.dialects import detect, named
from llmpipe.checkpoint.megatron.directory import iteration_folder
from llmpipe.checkpoint.megatron.layout import Place, Placed, check_split, rank_layout
from llmpipe.checkpoint.megatron.ranks import Found, Opened, open_folder
from llmpipe.checkpoint.megatron.shape import read_shape
from llmpipe.checkpoint.pieces import cut_out
from llmpipe.checkpoint.source import Slices, check_tensors
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape

log = logging.getLogger(__name__)


class MegatronSource(FileSource):
    """A directory of Megatron's: rank files of TP x PP in any dialect, or Megatron-LM's torch_dist.

    `path` is the root or an iteration's folder. `expected` fills what the args leave open, and is checked against the
    rest; `dialect` and `vocab` (true rows of the vocabulary) settle what the files leave in doubt.
    """

    def __init__(
        self, path: Path, expected: Shape | None = None, dialect: str | None = None, vocab: int | None = None
    ) -> None:
        opened = open_folder(iteration_folder(path))
        self.dialect = _dialect(path, opened, dialect)
        for place, tensors in opened.places.items():
            opened.places[place] = _renamed(tensors, self.dialect)
        known = read_shape(path, opened, self.dialect, expected, vocab)
        check_split(self.dialect, known.shape, known.grid)
        super().__init__(path, known.shape, FAMILIES[known.shape.family].keys(known.shape))
        self.layernorm_1p = known.layernorm_1p
        layouts = {place: rank_layout(self.dialect, known.shape, known.grid, place) for place in known.grid.places()}
        for place, placed in layouts.items():
            self._check(opened, place, placed)
        for place, placed in layouts.items():
            for item in placed:
                self._add(opened, place, item)
        self.check_covered()
        self.check_different()

    def _check(self, opened: Opened, place: Place, placed: list[Placed]) -> None:
        found = opened.places[place]
        where = next(iter(found.values())).file if found else opened.folder
        expected = {item.stored.name: item.stored.shape for item in placed}
        check_tensors(where, expected, {name: tensor.shape for name, tensor in found.items()})

    def _add(self, opened: Opened, place: Place, item: Placed) -> None:
        """The blocks of a tensor, or the proof that it is the copy of one that was added."""
        found = opened.places[place][item.stored.name]
        if item.copy_of:
            self._check_copy(found, opened.places[item.copy_of[0]][item.copy_of[1]], item.stored.name)
            return
        for rows, cols, tensor in found.pieces:
            for key, block in blocks_of(cut_out(item.stored, rows, cols), tensor):
                self.add(key, block, tensor.dtype)

    def _check_copy(self, found: Found, first: Found, name: str) -> None:
        pairs = zip(found.pieces, first.pieces, strict=True)
        if not all(same_bytes(one[2], other[2]) for one, other in pairs):
            raise UserError(
                f"{found.file}: {name} is not what {first.file} holds of it: they are not of one model, or of different"
                " steps: copy or download all ranks again"
            )

    def _less_one(self, key: str) -> bool:
        """Whether a tensor is stored less 1 (--apply-layernorm-1p)."""
        return self.layernorm_1p and key.endswith("norm.weight")

    def dtype(self, key: str) -> torch.dtype:
        stored = super().dtype(key)
        return torch.float32 if self._less_one(key) else stored  # 1 + w in 16 bits would round w away

    def blocks(self, key: str) -> list[Block] | None:
        return None if self._less_one(key) else super().blocks(key)

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        stored = super().read(key, slices)
        return stored.to(torch.float32) + 1 if self._less_one(key) else stored


def _dialect(path: Path, opened: Opened, name: str | None) -> Dialect:
    if name:
        return named(name)
    names = {name for tensors in opened.places.values() for name in tensors}
    found = detect(names, opened.args, path)
    log.info("%s: read as of %s (--source-dialect %s)", path, found.system, found.name)
    return found


def _renamed(tensors: dict[str, Found], dialect: Dialect) -> dict[str, Found]:
    """The tensors by the dialect's own names, without those that hold no weights."""
    found: dict[str, Found] = {}
    for name, tensor in tensors.items():
        if re.search(dialect.ignored, name):
            continue
        new = name
        for pattern, replacement in dialect.aliases:
            new = re.sub(pattern, replacement, new)
        if new in found:
            raise UserError(f"{tensor.file} holds {new} twice, under another version's name too: {name}")
        found[new] = tensor
    return found
