"""One decoder for all families: a rank's slice (tp) of a pipeline stage's layers (pp x vp).

N tokens (all rows and documents end to end), H hidden, V vocabulary. Parameter names are the family table's.
With tp > 1, between layers each rank holds N/tp tokens (sequence parallelism). With cp > 1, N is a context rank's own
share of the micro-batch's tokens, and only attention sees the others'.
"""

import torch
from torch import nn

from llmpipe.families import ONE_STAGE, Shape
from llmpipe.layout import Stages, chunk
from llmpipe.model.dropout import Key, drop
from llmpipe.model.layer import Layer, norm_of
from llmpipe.model.loss import Rows, linear_cross_entropy
from llmpipe.model.packed import Packed
from llmpipe.model.recompute import Recompute, recomputed
from llmpipe.model.rope import rope_table
from llmpipe.parallel.groups import ContextParallel, TensorParallel
from llmpipe.parallel.tensor import Weight, column_linears, vocab_embedding
from llmpipe.recipe import Dropout


class Decoder(nn.Module):
    """A pipeline stage's layers; the first stage embeds tokens, the last one has norm, head and loss.

    A head that is tied to the embedding is the same parameter where one stage has both, else a copy on the last one.
    """

    def __init__(
        self,
        shape: Shape,
        tp: TensorParallel | None = None,
        stages: Stages = ONE_STAGE,
        stage: int = 0,
        recompute: Recompute | None = None,
        cp: ContextParallel | None = None,
        dropout: Dropout | None = None,
    ):
        super().__init__()
        self.cp = cp or ContextParallel()
        self.shape, self.tp = shape, tp or TensorParallel()
        self.recompute, self.dropout = recompute or Recompute(), dropout or Dropout()
        self.is_first, self.is_last = stage == 0, stage == stages.count - 1
        shape.check_split(self.tp.size, stages)
        rows = chunk(shape.vocab, self.tp.size, self.tp.rank)
        self.first_row, num_local_rows = rows.start, rows.stop - rows.start
        self.hits: list[torch.Tensor] = []  # (N,) bool of each micro-batch: which labels were found the likeliest
        if self.is_first or (self.is_last and shape.tie_embeddings):
            self.embedding = Weight(num_local_rows, shape.hidden)
        self.layers = nn.ModuleDict({str(i): self._layer(i) for i in stages.run(shape.num_layers, stage)})
        if self.is_last:
            self.norm = norm_of(shape)
            self.head = self.embedding if shape.tie_embeddings else Weight(num_local_rows, shape.hidden)

    def _layer(self, i: int) -> Layer:
        return Layer(self.shape, self.tp, i, self.dropout, self.recompute.cores(i))

    def compile_layers(self) -> None:
        """Compile each layer by itself: what stands around it, FSDP2's gathering too, stays as it is."""
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            layer.compile_forward()

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One micro-batch through this stage.

        x: the first stage's (N,) token ids, else the stage before's (N/tp, H). cu_seqlens: (documents + 1,), any
        leading dimensions of 1, over all context ranks' tokens. Returns (N/tp, H); from the last stage Σ weights·ℓ as
        (1,), or without labels this rank's logits (N, V/tp). seed: (1,), the micro-batch's of this rank; None drops
        nothing.
        """
        packed = Packed(cu_seqlens.flatten(), self.cp)
        key = None if seed is None else (seed.cpu(),)  # FSDP2 moves it to the GPU, from which each drop would fetch it
        if self.is_first:
            x = vocab_embedding(x, self.tp, self.embedding, self.first_row)  # (N,) → (N/tp, H)
            x = drop(x, self.dropout.embedding, key and (*key, "embedding"))
        x = self._through_layers(x, packed, key)
        if not self.is_last:
            return x
        x = self.norm(x)  # (N/tp, H)
        if labels is None or weights is None:
            return column_linears(x, self.tp, self.head)[0]  # (N, V/tp)
        rows = Rows(self.tp, self.first_row)
        loss, hits = linear_cross_entropy(x, self.head.weight, labels, weights, rows)  # (1,), (N,)
        self.hits.append(hits)
        return loss

    def _through_layers(self, x: torch.Tensor, packed: Packed, key: Key | None) -> torch.Tensor:
        """(N/tp, H) → (N/tp, H)."""
        cos, sin = rope_table(packed.positions(), packed.lengths(), self.shape)
        for name, layer in self.layers.items():
            i = int(name)
            x = recomputed(self.recompute.whole(i), layer, x, cos, sin, packed, key and (*key, i))
        return x
