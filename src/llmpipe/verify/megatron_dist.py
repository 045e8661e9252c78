"""Megatron-LM's `torch_dist` directories, opened for the plain forward as if one TP rank held everything.

`common.pt` has the arguments; the tensors are whole, in chunks, and those of the layers stand in one tensor whose first
dimension is the layer, under names without a number.
"""

import re
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

    def read(self, key: str) -> list[torch.Tensor]:
        """A tensor, its chunks put together."""
        (held,) = self.tensors[key]
        sharded = held.sharded
        first = held.layer or 0
        count = sharded.shape[0] if held.layer is None else 1
        whole = torch.empty((count, *sharded.shape[1:]), dtype=sharded.dtype)
        for chunk in sharded.chunks:
            start, stop = max(chunk.offsets[0], first), min(chunk.offsets[0] + chunk.sizes[0], first + count)
            if start < stop:
                rest = [slice(at, at + size) for at, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                part = self._maps.tensor(locate(sharded, chunk))
                whole[(slice(start - first, stop - first), *rest)] = part[
                    start - chunk.offsets[0] : stop - chunk.offsets[0]
                ]
        return [whole if held.layer is None else whole[0]]
