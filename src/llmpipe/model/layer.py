"""The decoder's layer: its family's norm, attention, MLP, and their order.

N tokens (all rows and documents end to end), H hidden, D head_dim. Parameter names are the family table's.
With tp > 1, between layers each rank holds N/tp tokens (sequence parallelism).
"""

import torch
import torch.nn.functional as F
from torch import nn

from llmpipe.families import FAMILIES, Shape
from llmpipe.model.attention import attend
from llmpipe.model.packed import Packed
from llmpipe.model.rope import rotate
from llmpipe.parallel.groups import TensorParallel
from llmpipe.parallel.tensor import Weight, column_linears, row_linear


class RMSNorm(Weight):
    """Zhang and Sennrich 2019. Over a layer's whole width, or over each head's."""

    def __init__(self, size: int, eps: float):
        super().__init__(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class LayerNorm(Weight):
    """Ba et al. 2016."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, bias=True)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def norm_of(shape: Shape) -> RMSNorm | LayerNorm:
    """A norm of the kind that the shape's family has."""
    return NORMS[FAMILIES[shape.family].norm](shape.hidden, shape.norm_eps)


class Attention(nn.Module):
    """Grouped-query self-attention over this rank's heads; a token sees the `window` tokens that end with itself."""

    def __init__(self, shape: Shape, tp: TensorParallel, window: int | None):
        super().__init__()
        self.tp, self.head_dim, self.window = tp, shape.head_dim, window
        num_local_heads = shape.num_heads // tp.size
        num_local_kv_heads = max(1, shape.num_kv_heads // tp.size)  # fewer KV heads than ranks: some hold the same head
        self.q = Weight(num_local_heads * self.head_dim, shape.hidden, bias=shape.qkv_bias)
        self.k = Weight(num_local_kv_heads * self.head_dim, shape.hidden, bias=shape.qkv_bias)
        self.v = Weight(num_local_kv_heads * self.head_dim, shape.hidden, bias=shape.qkv_bias)
        self.o = Weight(shape.hidden, num_local_heads * self.head_dim, bias=shape.output_bias)
        self.q_norm = RMSNorm(self.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: Packed) -> torch.Tensor:
        flat = column_linears(x, self.tp, self.q, self.k, self.v)  # (N/tp, H) → (N, local heads · D) each
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)  # (N, local heads, D)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = attend(q, k, v, packed, self.window)  # (N, local heads, D)
        return row_linear(out.flatten(1), self.tp, self.o)  # (N/tp, H)


class SwiGLU(nn.Module):
    """Shazeer 2020."""

    def __init__(self, shape: Shape, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.gate = Weight(shape.ffn // tp.size, shape.hidden, bias=shape.mlp_bias)
        self.up = Weight(shape.ffn // tp.size, shape.hidden, bias=shape.mlp_bias)
        self.down = Weight(shape.hidden, shape.ffn // tp.size, bias=shape.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = column_linears(x, self.tp, self.gate, self.up)  # (N/tp, H) → (N, ffn/tp) each
        return row_linear(F.silu(gate) * up, self.tp, self.down)  # (N/tp, H)


class GELU(nn.Module):
    """The exact one, without a gate. Hendrycks and Gimpel 2016."""

    def __init__(self, shape: Shape, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.up = Weight(shape.ffn // tp.size, shape.hidden, bias=shape.mlp_bias)
        self.down = Weight(shape.hidden, shape.ffn // tp.size, bias=shape.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (up,) = column_linears(x, self.tp, self.up)  # (N/tp, H) → (N, ffn/tp)
        return row_linear(F.gelu(up), self.tp, self.down)  # (N/tp, H)


MLPS = {"swiglu": SwiGLU, "gelu": GELU}


class Layer(nn.Module):
    """Attention and MLP, each behind a norm: one after the other, or side by side on the layer's input."""

    def __init__(self, shape: Shape, tp: TensorParallel, layer: int):
        super().__init__()
        family = FAMILIES[shape.family]
        self.parallel = family.parallel
        self.attention_norm = norm_of(shape)
        self.attention = Attention(shape, tp, shape.window_of(layer))
        self.mlp_norm = norm_of(shape) if shape.mlp_norm else None
        self.mlp = MLPS[family.mlp](shape, tp)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: Packed) -> torch.Tensor:
        normed = self.attention_norm(x)  # (N/tp, H)
        attended = self.attention(normed, cos, sin, packed)  # (N/tp, H)
        if self.parallel:
            return x + (self.mlp(self.mlp_norm(x) if self.mlp_norm else normed) + attended)  # (N/tp, H)
        assert self.mlp_norm
        x = x + attended  # (N/tp, H)
        return x + self.mlp(self.mlp_norm(x))  # (N/tp, H)
