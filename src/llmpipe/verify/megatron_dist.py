"""Megatron-LM's `torch_dist` directories, opened for the plain forward as if one TP rank held everything.

`common.pt` has the arguments; the tensors are whole, in chunks, and those of the layers stand in one tensor whose first
dimension is the layer, under names without a number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llmpipe.checkpoint.containers.distcp import Sharded, locate, read_distcp
from llmpipe.checkpoint.containers.torch_file import read_torch_file
from llmpipe.errors import UserError
from llmpipe.verify.megatron_files import Maps, arguments_of, iteration_of

_STACKED = re.compile(r"\blayers\.(?!\d)")


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor, or one layer of a stacked one."""

    sharded: Sharded
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sharded.shape if self.layer is None else self.sharded.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.sharded.dtype


class DistFiles:
    """The same as RankFiles, of one rank."""

    tp = pp = 1

    def __init__(self, path: Path):
        self.directory = iteration_of(path)
        common = self.directory / "common.pt"
        if not common.is_file():
            raise UserError(f"{common} is missing: only Megatron-LM's torch_dist directories are read: copy all files")
        self.args = arguments_of(read_torch_file(common, stand_ins=True).get("args"))
        self.tensors: dict[str, list[Held]] = {}
        for name, sharded in read_distcp(self.directory).tensors.items():
            if name.startswith("optimizer."):
                continue
            layers = range(sharded.shape[0]) if _STACKED.search(name) else [None]
            for layer in layers:
                key = name if layer is None else _STACKED.sub(f"layers.{layer}.", name, count=1)
                self.tensors[key] = [Held(sharded, layer)]
        self._maps = Maps()

    def read(self, key: str, rows: slice = slice(None)) -> list[torch.Tensor]:
        """A tensor, or rows of it, its chunks put together."""
        (held,) = self.tensors[key]
        first, last, _ = rows.indices(held.shape[0])
        whole = torch.empty((last - first, *held.shape[1:]), dtype=held.dtype)
        for offsets, part in self._chunks(held):
            start, stop = max(offsets[0], first), min(offsets[0] + len(part), last)
            if start < stop:
                rest = [slice(at, at + size) for at, size in zip(offsets[1:], part.shape[1:], strict=True)]
                whole[(slice(start - first, stop - first), *rest)] = part[start - offsets[0] : stop - offsets[0]]
        return [whole]

    def _chunks(self, held: Held) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Where each begins, and what it holds, mapped into memory; of a stacked tensor the layer's part."""
        for chunk in held.sharded.chunks:
            part, layer = self._maps.tensor(locate(held.sharded, chunk)), held.layer
            if layer is None:
                yield chunk.offsets, part
            elif chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                yield chunk.offsets[1:], part[layer - chunk.offsets[0]]
