"""One decoder for all families: a rank's slice (tp) of a stage's layers (pp).

N tokens (all rows and documents end to end), H hidden, D head_dim, V vocabulary. Parameter names are the family
table's. With tp > 1, between layers each rank holds N/tp tokens (sequence parallelism).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmpipe.families import ONE_STAGE, Shape
from llmpipe.layout import Stages, chunk
from llmpipe.model.attention import Packed, attend
from llmpipe.model.loss import cross_entropy
from llmpipe.model.rope import rope_table, rotate
from llmpipe.parallel.groups import TensorParallel
from llmpipe.parallel.tensor import Weight, column_linears, row_linear, vocab_embedding


class Norm(Weight):
    """RMSNorm. Zhang and Sennrich 2019."""

    def __init__(self, hidden: int, eps: float):
        super().__init__(hidden)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention over this rank's heads."""

    def __init__(self, shape: Shape, tp: TensorParallel):
        super().__init__()
        self.tp, self.head_dim = tp, shape.head_dim
        num_local_heads = shape.num_heads // tp.size
        num_local_kv_heads = max(1, shape.num_kv_heads // tp.size)  # fewer KV heads than ranks: some hold the same head
        self.q = Weight(num_local_heads * self.head_dim, shape.hidden)
        self.k = Weight(num_local_kv_heads * self.head_dim, shape.hidden)
        self.v = Weight(num_local_kv_heads * self.head_dim, shape.hidden)
        self.o = Weight(shape.hidden, num_local_heads * self.head_dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: Packed) -> torch.Tensor:
        flat = column_linears(x, self.tp, self.q, self.k, self.v)  # (N/tp, H) → (N, local heads · D) each
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)  # (N, local heads, D)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, packed)  # (N, local heads, D)
        return row_linear(out.flatten(1), self.tp, self.o)  # (N/tp, H)


class MLP(nn.Module):
    """SwiGLU. Shazeer 2020."""

    def __init__(self, shape: Shape, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.gate = Weight(shape.ffn // tp.size, shape.hidden)
        self.up = Weight(shape.ffn // tp.size, shape.hidden)
        self.down = Weight(shape.hidden, shape.ffn // tp.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = column_linears(x, self.tp, self.gate, self.up)  # (N/tp, H) → (N, ffn/tp) each
        return row_linear(F.silu(gate) * up, self.tp, self.down)  # (N/tp, H)


class Layer(nn.Module):
    """Norm, attention, norm, MLP, each pair around a residual."""

    def __init__(self, shape: Shape, tp: TensorParallel):
        super().__init__()
        self.attention_norm = Norm(shape.hidden, shape.norm_eps)
        self.attention = Attention(shape, tp)
        self.mlp_norm = Norm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape, tp)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: Packed) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, packed)  # (N/tp, H)
        return x + self.mlp(self.mlp_norm(x))  # (N/tp, H)


class Decoder(nn.Module):
    """The layers of one pipeline stage; the first stage embeds tokens, the last one has norm, head and loss."""

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
        if self.is_first:
            self.embedding = Weight(num_local_rows, shape.hidden)
        layers = stages.layers_of(shape.num_layers, rank)
        self.layers = nn.ModuleDict({str(i): Layer(shape, self.tp) for i in layers})
        if self.is_last:
            self.norm = Norm(shape.hidden, shape.norm_eps)
            self.head = self.embedding if shape.tie_embeddings else Weight(num_local_rows, shape.hidden)

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One micro-batch through this stage.

        x: the first stage's (N,) token ids, else the stage before's (N/tp, H). cu_seqlens: (documents + 1,), any
        leading dimensions of 1. Returns (N/tp, H); from the last stage Σ weights·ℓ as (1,), or without labels this
        rank's logits (N, V/tp).
        """
        packed = Packed(cu_seqlens.flatten())
        if self.is_first:
            x = vocab_embedding(x, self.tp, self.embedding, self.first_row)  # (N,) → (N/tp, H)
        num_tokens = x.shape[0] * self.tp.size
        cos, sin = rope_table(packed.positions(num_tokens), self.shape.head_dim, self.shape.rope_theta)
        for layer in self.layers.values():
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, packed, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = layer(x, cos, sin, packed)
        if not self.is_last:
            return x
        (logits,) = column_linears(self.norm(x), self.tp, self.head)  # (N/tp, H) → (N, V/tp)
        if labels is None or weights is None:
            return logits
        losses = cross_entropy(logits, labels, self.tp, self.first_row)  # (N,)
        return (losses * weights).sum(dim=0, keepdim=True)
