"""What a model family is: data. One table of tensors that convert, verify's accounting, shard and export all read."""

import math
from dataclasses import dataclass, field
from typing import Any

from llmpipe.errors import UserError
from llmpipe.layout import check_split, chunk, kv_chunk, stage_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's hyper-parameters; every one is carried from the source to the export (design decision 3)."""

    family: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    """True rows of the embedding, never padded."""
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's rope_scaling; only None for now."""
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "vocab", "max_positions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}, but has to be a whole number from 1 on")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"{name} is {value!r}, but has to be a number above 0")

    def size(self, dim: str) -> int:
        """The size of a symbolic dimension of `Tensor.dims`."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "ffn": self.ffn,
        }
        return sizes[dim]

    def check_split(self, tp: int, pp: int) -> None:
        """UserError, naming what would work, if this model cannot be split tp x pp."""
        if self.tie_embeddings and pp > 1:
            raise UserError(f"the model's embedding and head are one tensor: pp has to be 1, not {pp}, in this version")
        check_split(tp, pp, self.num_heads, self.num_kv_heads, self.num_layers, self.ffn)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of a family's table; `{}` in a name stands for the global layer number."""

    name: str
    """Ours: the decoder's parameter, the rank files' key."""
    hf: str
    """The checkpoint's key."""
    dims: tuple[str, ...]
    """Symbolic sizes, see `Shape.size`."""
    shard_dim: int | None
    """The dimension that tp splits; None is replicated."""

    @property
    def per_layer(self) -> bool:
        return "{}" in self.name

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """The full tensor's sizes."""
        return tuple(shape.size(dim) for dim in self.dims)

    def slices(self, shape: Shape, tp: int, rank: int) -> tuple[slice, ...]:
        """The part of the full tensor that a tp rank holds, one slice per dimension."""
        parts = [slice(0, size) for size in self.shape(shape)]
        if self.shard_dim is not None:
            dim = self.dims[self.shard_dim]
            parts[self.shard_dim] = (
                kv_chunk(shape.num_kv_heads, shape.head_dim, tp, rank)
                if dim == "kv"
                else chunk(shape.size(dim), tp, rank)
            )
        return tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family: its tensors, and its named sizes."""

    name: str
    architecture: str
    """config.json's `architectures[0]`."""
    tensors: tuple[Tensor, ...]
    first: tuple[str, ...]
    """Tensors that stand on the first pipeline stage beside its layers."""
    last: tuple[str, ...]
    """Tensors that stand on the last stage."""
    sizes: dict[str, Shape] = field(default_factory=dict)

    def keys(self, shape: Shape, pp: int = 1, stage: int = 0) -> dict[str, Tensor]:
        """Our full names (layer numbers filled in) of a stage's tensors, in file order."""
        layers = stage_layers(shape.num_layers, pp, stage)
        found: dict[str, Tensor] = {}
        for tensor in self.tensors:
            if tensor.per_layer:
                continue
            here = (stage == 0 and tensor.name in self.first) or (stage == pp - 1 and tensor.name in self.last)
            if here and not (shape.tie_embeddings and tensor.name == "head.weight"):
                found[tensor.name] = tensor
        for layer in layers:
            found |= {t.name.format(layer): t for t in self.tensors if t.per_layer}
        return found

    def num_parameters(self, shape: Shape) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape(shape)) for tensor in self.keys(shape).values())

    def hf_name(self, key: str) -> str:
        """The checkpoint's key for one of our full names."""
        return self._names()[generic(key)].hf.format(layer_of(key))

    def _names(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}


def layer_of(key: str) -> int | None:
    """The layer number in one of our full names, None outside the layers."""
    parts = key.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def generic(key: str) -> str:
    """One of our full names with `{}` for its layer number."""
    layer = layer_of(key)
    return key if layer is None else key.replace(f"layers.{layer}.", "layers.{}.", 1)
