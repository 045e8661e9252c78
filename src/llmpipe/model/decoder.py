"""One decoder for all families: a rank's slice (tp) of a stage's layers (pp).

N tokens (all rows and documents end to end), H hidden, V vocabulary. Parameter names are the family table's.
With tp > 1, between layers each rank holds N/tp tokens (sequence parallelism). With cp > 1, N is a context rank's own
share of the micro-batch's tokens, and only attention sees the others'.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmpipe.families import ONE_STAGE, Shape
from llmpipe.layout import Stages, chunk
from llmpipe.model.layer import Layer, norm_of
from llmpipe.model.loss import Rows, linear_cross_entropy
from llmpipe.model.packed import Packed
from llmpipe.model.rope import rope_table
from llmpipe.parallel.groups import ContextParallel, TensorParallel
from llmpipe.parallel.tensor import Weight, column_linears, vocab_embedding


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
        cp: ContextParallel | None = None,
    ):
        super().__init__()
        self.cp = cp or ContextParallel()
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
        leading dimensions of 1, over all context ranks' tokens. Returns (N/tp, H); from the last stage Σ weights·ℓ as
        (1,), or without labels this rank's logits (N, V/tp).
        """
        packed = Packed(cu_seqlens.flatten(), self.cp)
        if self.is_first and run == 0:
            x = vocab_embedding(x, self.tp, self.embedding, self.first_row)  # (N,) → (N/tp, H)
        x = self._through_layers(x, packed, run)
        if not (self.is_last and run == len(self.runs) - 1):
            return x
        x = self.norm(x)  # (N/tp, H)
        if labels is None or weights is None:
            return column_linears(x, self.tp, self.head)[0]  # (N, V/tp)
        rows = Rows(self.tp, self.shape.vocab, self.first_row)
        return linear_cross_entropy(x, self.head.weight, labels, weights, rows)  # (1,)

    def _through_layers(self, x: torch.Tensor, packed: Packed, run: int) -> torch.Tensor:
        """(N/tp, H) → (N/tp, H)."""
        cos, sin = rope_table(packed.positions(), packed.lengths(), self.shape)
        for layer in (self.layers[str(i)] for i in self.runs[run]):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, packed, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = layer(x, cos, sin, packed)
        return x
