"""The decoder's layer: its family's norm, attention, MLP, and their order.

N tokens (all rows and documents end to end), H hidden, D head_dim. Parameter names are the family table's.
With tp > 1, between layers each rank holds N/tp tokens (sequence parallelism).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmpipe.families import FAMILIES, Shape
from llmpipe.model.attention import attend
from llmpipe.model.dropout import Key, drop
from llmpipe.model.packed import Packed
from llmpipe.model.recompute import recomputed
from llmpipe.model.rope import rotate
from llmpipe.parallel.groups import TensorParallel
from llmpipe.parallel.tensor import Weight, column_linears, row_linear
from llmpipe.recipe import Dropout


class RMSNorm(Weight):
    """Zhang and Sennrich 2019. Over a layer's whole width, or over each head's."""

    def __init__(self, size: int, eps: float):
        super().__init__(size)
        self.eps = eps
        self.kernel: Callable[..., torch.Tensor] = F.rms_norm  # train/apex.py has another one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, list(x.shape[-1:]), self.weight, self.eps)


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
    """Grouped-query self-attention over this rank's heads; a token sees the `window` tokens that end with itself.

    `recompute`: what lies between the products with weights is not kept for the backward pass.
    """

    def __init__(self, shape: Shape, tp: TensorParallel, window: int | None, dropout: float, recompute: bool):
        super().__init__()
        self.tp, self.head_dim, self.window = tp, shape.head_dim, window
        self.dropout, self.recompute = dropout, recompute
        self.attend: Callable[..., torch.Tensor] = attend
        num_local_heads = shape.num_heads // tp.size
        num_local_kv_heads = max(1, shape.num_kv_heads // tp.size)  # fewer KV heads than ranks: some hold the same head
        self.q = Weight(num_local_heads * self.head_dim, shape.hidden, bias=shape.qkv_bias)
        self.k = Weight(num_local_kv_heads * self.head_dim, shape.hidden, bias=shape.qkv_bias)
        self.v = Weight(num_local_kv_heads * self.head_dim, shape.hidden, bias=shape.qkv_bias)
        self.o = Weight(shape.hidden, num_local_heads * self.head_dim, bias=shape.output_bias)
        self.q_norm = RMSNorm(self.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: Packed, key: Key | None
    ) -> torch.Tensor:
        flat = column_linears(x, self.tp, self.q, self.k, self.v)  # (N/tp, H) → (N, local heads · D) each
        return recomputed(self.recompute, self._between, *flat, cos, sin, packed, key)

    def _between(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        packed: Packed,
        key: Key | None,
    ) -> torch.Tensor:
        """(N, local heads · D) each → (N/tp, H)."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (N, local heads, D)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = self.attend(q, k, v, packed, self.window, self.dropout, key)  # (N, local heads, D)
        return row_linear(out.flatten(1), self.tp, self.o)  # (N/tp, H)


class SwiGLU(nn.Module):
    """Shazeer 2020."""

    def __init__(self, shape: Shape, tp: TensorParallel, recompute: bool):
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.gate = Weight(shape.ffn // tp.size, shape.hidden, bias=shape.mlp_bias)
        self.up = Weight(shape.ffn // tp.size, shape.hidden, bias=shape.mlp_bias)
        self.down = Weight(shape.hidden, shape.ffn // tp.size, bias=shape.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = column_linears(x, self.tp, self.gate, self.up)  # (N/tp, H) → (N, ffn/tp) each
        return recomputed(self.recompute, self._down, gate, up)  # (N/tp, H)

    def _down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return row_linear(F.silu(gate) * up, self.tp, self.down)


class GELU(nn.Module):
    """The exact one, without a gate. Hendrycks and Gimpel 2016."""

    def __init__(self, shape: Shape, tp: TensorParallel, recompute: bool):
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.up = Weight(shape.ffn // tp.size, shape.hidden, bias=shape.mlp_bias)
        self.down = Weight(shape.hidden, shape.ffn // tp.size, bias=shape.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (up,) = column_linears(x, self.tp, self.up)  # (N/tp, H) → (N, ffn/tp)
        return recomputed(self.recompute, self._down, up)  # (N/tp, H)

    def _down(self, up: torch.Tensor) -> torch.Tensor:
        return row_linear(F.gelu(up), self.tp, self.down)


MLPS = {"swiglu": SwiGLU, "gelu": GELU}


class Layer(nn.Module):
    """Attention and MLP, each behind a norm: one after the other, or side by side on the layer's input.

    What is added to the residual stream passes through dropout first. `recompute`: what is large and cheap to compute
    is not kept for the backward pass.
    """

    def __init__(
        self, shape: Shape, tp: TensorParallel, layer: int, dropout: Dropout | None = None, recompute: bool = False
    ):
        super().__init__()
        family, dropout = FAMILIES[shape.family], dropout or Dropout()
        self.parallel, self.dropout = family.parallel, dropout.hidden_of(layer, shape.num_layers)
        self.attention_norm = norm_of(shape)
        self.attention = Attention(shape, tp, shape.window_of(layer), dropout.attention, recompute)
        self.mlp_norm = norm_of(shape) if shape.mlp_norm else None
        self.mlp = MLPS[family.mlp](shape, tp, recompute)
        self.drop: Callable[..., torch.Tensor] = drop

    def compile_forward(self) -> None:
        """Compile it, but for what would be compiled anew for each batch's documents, and for masks."""
        disable: Callable[..., Any] = torch.compiler.disable  # it imports the compiler: half a second
        self.attention.attend = disable(attend)
        if self.dropout:
            self.drop = disable(drop)
        self.forward = torch.compile(self.forward)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: Packed, key: Key | None = None
    ) -> torch.Tensor:
        """(N/tp, H) → (N/tp, H); without a key nothing is dropped."""
        normed = self.attention_norm(x)  # (N/tp, H)
        attended = self.attention(normed, cos, sin, packed, key and (*key, "attention"))  # (N/tp, H)
        if self.parallel:
            added = self.mlp(self.mlp_norm(x) if self.mlp_norm else normed) + attended  # (N/tp, H)
            return x + self.drop(added, self.dropout, key and (*key, "both"))
        assert self.mlp_norm
        x = x + self.drop(attended, self.dropout, key and (*key, "attended"))  # (N/tp, H)
        return x + self.drop(self.mlp(self.mlp_norm(x)), self.dropout, key and (*key, "mlp"))  # (N/tp, H)
