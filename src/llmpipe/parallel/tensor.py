"""Tensor-parallel layers on local tensors: column, row and vocabulary parallel, always with sequence parallelism.

N tokens (B·T flattened), H hidden, O a layer's full output size, V vocabulary, tp ranks.
Between layers a rank holds N/tp tokens; inside attention and MLP it holds all N tokens and 1/tp of the heads or rows.
Megatron-LM: Shoeybi et al. 2019; sequence parallelism: Korthikanti et al. 2022.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmpipe.parallel.collectives import all_gather_rows, reduce_scatter_rows, scatter_rows
from llmpipe.parallel.groups import TensorParallel


class Weight(nn.Module):
    """A parameter `weight` under the table's name; the layer's arithmetic is in the functions below."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class _ColumnLinears(torch.autograd.Function):
    """Keeps only this rank's N/tp tokens for the backward pass and gathers them again there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        full = all_gather_rows(x, tp)  # (N, H)
        return tuple(F.linear(full, weight) for weight in weights)  # (N, O/tp) each

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        full = all_gather_rows(x, ctx.tp)  # (N, H)
        grad_x = grads[0] @ weights[0]  # (N, H)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x = grad_x + grad @ weight
        grad_weights = [grad.t() @ full for grad in grads]  # (O/tp, H) each
        return reduce_scatter_rows(grad_x, ctx.tp), None, *grad_weights


def column_linears(x: torch.Tensor, tp: TensorParallel, *layers: Weight) -> tuple[torch.Tensor, ...]:
    """(N/tp, H) → (N, O/tp) for each layer, whose weights are (O/tp, H)."""
    weights = [layer.weight for layer in layers]
    if tp.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    return _ColumnLinears.apply(x, tp, *weights)  # type: ignore[return-value]


def row_linear(x: torch.Tensor, tp: TensorParallel, layer: Weight) -> torch.Tensor:
    """(N, I/tp) → (N/tp, H), with the weight (H, I/tp)."""
    return scatter_rows(F.linear(x, layer.weight), tp)


def vocab_embedding(tokens: torch.Tensor, tp: TensorParallel, layer: Weight, first_row: int) -> torch.Tensor:
    """(N,) token ids → (N/tp, H); the weight holds the rows from `first_row` on, other rows are another rank's."""
    if tp.size == 1:
        return F.embedding(tokens, layer.weight)
    rows = tokens - first_row
    foreign = (rows < 0) | (rows >= layer.weight.shape[0])
    found = F.embedding(rows.masked_fill(foreign, 0), layer.weight)  # (N, H)
    return scatter_rows(found.masked_fill(foreign[:, None], 0.0), tp)
