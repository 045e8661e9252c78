"""What a model family is: data. One table of tensors that convert, verify's accounting, shard and export all read."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from llmpipe.errors import UserError
from llmpipe.layout import Stages, check_split, chunk, kv_chunk

ONE_STAGE = Stages()
# Beyond every model, and before the tables of tensors fill the memory.
_MOST = {"num_layers": 10_000}


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
    """Hugging Face's rope_parameters without theta: {"rope_type": "llama3", "factor": 8.0, ...}; None is unscaled."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether attention's output projection has a bias."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether each head of q and k has an RMSNorm before the rotary embedding."""
    layer_norms: int = 2
    """Norms a layer; 1: attention and MLP, side by side, read the same normed input (Falcon 7B)."""
    window: int | None = None
    """The tokens that a token sees, itself included; None: all before it."""
    window_from: int = 0
    """The first layer with the window; those before see everything (Qwen2's max_window_layers)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "vocab", "max_positions"):
            value = getattr(self, name)
            limit = _MOST.get(name, 1 << 31)
            if type(value) is not int or not 1 <= value <= limit:
                raise UserError(f"{name} is {value!r}, but has to be a whole number from 1 on, {limit} at most")
        for name, limit in (("norm_eps", 1), ("rope_theta", math.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < limit:
                raise UserError(f"{name} is {value!r}, but has to be a number above 0{' and below 1' * (limit == 1)}")
        for name in ("tie_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r}, but has to be true or false")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise UserError(f"window is {self.window!r}, but has to be a whole number from 1 on")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")

    @property
    def mlp_norm(self) -> bool:
        """Whether the MLP has a norm of its own."""
        return self.layer_norms == 2

    @property
    def shared_norm(self) -> bool:
        """Whether one norm feeds both attention and MLP."""
        return self.layer_norms == 1

    def window_of(self, layer: int) -> int | None:
        """The window of one layer."""
        return self.window if layer >= self.window_from else None

    def size(self, dim: str) -> int:
        """The size of a symbolic dimension of `Tensor.dims`."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "ffn": self.ffn,
            "head": self.head_dim,
        }
        return sizes[dim]

    def check_split(self, tp: int, stages: Stages) -> None:
        """UserError, naming what would work, if this model cannot be split over tp ranks and these stages."""
        check_split(tp, self.num_heads, self.num_kv_heads, self.ffn)
        stages.check(self.num_layers)


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
    when: str | None = None
    """The field of `Shape` that says whether a model has it; None: every one has."""
    fused: Literal["q", "k", "v"] | None = None
    """Which part of a tensor that the checkpoint keeps fused: for each KV head its query heads, then K, then V."""

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
    """A family: its tensors, the arithmetic between them, its config.json, and its named sizes."""

    name: str
    """config.json's `model_type`."""
    architecture: str
    """config.json's `architectures[0]`."""
    tensors: tuple[Tensor, ...]
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    parallel: bool = False
    """Attention and MLP side by side on the layer's input, instead of one after the other."""
    windowed: bool = False
    """Whether config.json may ask for a sliding window."""
    window_switch: bool = False
    """Whether it does so only with use_sliding_window, and from max_window_layers on."""
    config: dict[str, str]
    """Fields of `Shape` and config.json's keys for them."""
    defaults: dict[str, Any]
    """What transformers takes for fields of `Shape` whose key config.json leaves out."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields of `Shape` that are the same in every model of the family, and not in config.json."""
    only: dict[str, Any] = field(default_factory=dict)
    """config.json's keys that the decoder computes in one value only."""
    sizes: dict[str, Shape] = field(default_factory=dict)

    def keys(self, shape: Shape, stages: Stages = ONE_STAGE, rank: int = 0) -> dict[str, Tensor]:
        """Our full names (layer numbers filled in) of a pipeline rank's tensors, in file order.

        A head that is tied to the embedding is no tensor of its own; the last rank then holds the embedding too.
        """
        here = [tensor for tensor in self.tensors if tensor.when is None or getattr(shape, tensor.when)]
        outside = {tensor.name: tensor for tensor in here if not tensor.per_layer}
        head = "embedding.weight" if shape.tie_embeddings else "head.weight"
        found = {"embedding.weight": outside["embedding.weight"]} if rank == 0 else {}
        if rank == stages.pp - 1:
            found |= {name: row for name, row in outside.items() if name.startswith("norm.") or name == head}
        for layer in stages.layers_of(shape.num_layers, rank):
            found |= {t.name.format(layer): t for t in here if t.per_layer}
        return found

    def num_parameters(self, shape: Shape) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape(shape)) for tensor in self.keys(shape).values())

    def hf_name(self, key: str, shape: Shape) -> str:
        """The checkpoint's key for one of our full names."""
        return self.row(key, shape).hf.format(layer_of(key))

    def row(self, key: str, shape: Shape) -> Tensor:
        """The table's row of one of our full names."""
        rows = (tensor for tensor in self.tensors if tensor.name == generic(key))
        return next(row for row in rows if row.when is None or getattr(shape, row.when))


def layer_of(key: str) -> int | None:
    """The layer number in one of our full names, None outside the layers."""
    parts = key.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def generic(key: str) -> str:
    """One of our full names with `{}` for its layer number."""
    layer = layer_of(key)
    return key if layer is None else key.replace(f"layers.{layer}.", "layers.{}.", 1)
