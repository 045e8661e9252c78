"""One decoder for all families: a rank's slice (tp) of a stage's layers (pp).

The family's table chooses its parts. N tokens (all rows and documents end to end), H hidden, D head_dim, V vocabulary.
Parameter names are the table's. With tp > 1, between layers each rank holds N/tp tokens (sequence parallelism).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmpipe.families import FAMILIES, ONE_STAGE, Shape
from llmpipe.layout import Stages, chunk
from llmpipe.model.attention import Packed, attend
from llmpipe.model.loss import cross_entropy
from llmpipe.model.rope import rope_table, rotate
from llmpipe.parallel.groups import TensorParallel
from llmpipe.parallel.tensor import Weight, column_linears, row_linear, vocab_embedding


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


class Decoder(nn.Module):
    """A pipeline rank's layers; the first rank embeds tokens, the last one has norm, head and loss.

    A head that is tied to the embedding is the same parameter where one rank has both, else a copy on the last rank.
    """

    def __init__(
        self,
        shape: Shape,
        tp: TensorParallel | None = None,
        stages: Stages = ONE_STAGE,
        rank: int = 0,
        recompute: bool = False,
    ):
        super().__init__()
        self.shape, self.tp, self.recompute = shape, tp or TensorParallel(), recompute
        self.is_first, self.is_last = rank == 0, rank == stages.pp - 1
        shape.check_split(self.tp.size, stages)
        rows = chunk(shape.vocab, self.tp.size, self.tp.rank)
        self.first_row, num_local_rows = rows.start, rows.stop - rows.start
        if self.is_first or (self.is_last and shape.tie_embeddings):
            self.embedding = Weight(num_local_rows, shape.hidden)
        self.runs = stages.runs(shape.num_layers, rank)
        self.layers = nn.ModuleDict({str(i): Layer(shape, self.tp, i) for run in self.runs for i in run})
        if self.is_last:
            self.norm = norm_of(shape)
            self.head = self.embedding if shape.tie_embeddings else Weight(num_local_rows, shape.hidden)

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        run: int = 0,
    ) -> torch.Tensor:
        """One micro-batch through one of this rank's runs of layers: its stage, or one of its virtual stages.

        x: the first stage's (N,) token ids, else the stage before's (N/tp, H). cu_seqlens: (documents + 1,), any
        leading dimensions of 1. Returns (N/tp, H); from the last stage Σ weights·ℓ as (1,), or without labels this
        rank's logits (N, V/tp).
        """
        packed = Packed(cu_seqlens.flatten())
        if self.is_first and run == 0:
            x = vocab_embedding(x, self.tp, self.embedding, self.first_row)  # (N,) → (N/tp, H)
        x = self._through_layers(x, packed, run)
        if not (self.is_last and run == len(self.runs) - 1):
            return x
        (logits,) = column_linears(self.norm(x), self.tp, self.head)  # (N/tp, H) → (N, V/tp)
        if labels is None or weights is None:
            return logits
        losses = cross_entropy(logits, labels, self.tp, self.first_row)  # (N,)
        return (losses * weights).sum(dim=0, keepdim=True)

    def _through_layers(self, x: torch.Tensor, packed: Packed, run: int) -> torch.Tensor:
        """(N/tp, H) → (N/tp, H)."""
        num_tokens = x.shape[0] * self.tp.size
        cos, sin = rope_table(packed.positions(num_tokens), packed.lengths(num_tokens), self.shape)
        for layer in (self.layers[str(i)] for i in self.runs[run]):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, packed, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = layer(x, cos, sin, packed)
        return x
