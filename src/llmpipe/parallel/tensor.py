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
from llmpipe.parallel.compat import engine_runs
from llmpipe.parallel.groups import TensorParallel


class Weight(nn.Module):
    """Parameters `weight` and, if asked for, `bias` by the table's names; the layer's arithmetic is in functions."""

    def __init__(self, *shape: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None


class _ColumnLinears(torch.autograd.Function):
    """Keeps only this rank's N/tp tokens for the backward pass and gathers them again there."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tp: TensorParallel, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        weights, ctx.has_bias = parameters[::2], [bias is not None for bias in parameters[1::2]]
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        full = all_gather_rows(x, tp)  # (N, H)
        pairs = zip(weights, parameters[1::2], strict=True)
        return tuple(F.linear(full, weight, bias) for weight, bias in pairs)  # type: ignore[arg-type]  # (N, O/tp) each

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wants_x, wants_parameters = _wanted(ctx)
        grad_x: torch.Tensor | None = None
        if wants_x:
            grad_full = grads[0] @ weights[0]  # (N, H)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_full = grad_full + grad @ weight
            grad_x = reduce_scatter_rows(grad_full, ctx.tp)
        if not wants_parameters:
            return grad_x, None, *[None] * 2 * len(weights)
        full = all_gather_rows(x, ctx.tp)  # (N, H)
        grad_parameters: list[torch.Tensor | None] = []
        for grad, has_bias in zip(grads, ctx.has_bias, strict=True):
            grad_parameters += [grad.t() @ full, grad.sum(dim=0) if has_bias else None]  # (O/tp, H), (O/tp,)
        return grad_x, None, *grad_parameters


def _wanted(ctx: Any) -> tuple[bool, bool]:
    """Whether this pass wants the input's gradient, and any parameter's: half a pass of zero-bubble wants only one.

    All tp ranks run the same half, and so take part in the same collectives.
    """
    if torch.compiler.is_compiling():
        return True, True
    (x, _), *parameters = ctx.next_functions
    return engine_runs(x), any(engine_runs(node) for node, _ in parameters)


def column_linears(x: torch.Tensor, tp: TensorParallel, *layers: Weight) -> tuple[torch.Tensor, ...]:
    """(N/tp, H) → (N, O/tp) for each layer, whose weights are (O/tp, H) and biases (O/tp,)."""
    if tp.size == 1:
        return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    return _ColumnLinears.apply(x, tp, *parameters)  # type: ignore[return-value]


def row_linear(x: torch.Tensor, tp: TensorParallel, layer: Weight) -> torch.Tensor:
    """(N, I/tp) → (N/tp, H), with the weight (H, I/tp) and the bias (H,), added once, to each rank's own tokens."""
    if tp.size == 1:
        return F.linear(x, layer.weight, layer.bias)
    out = scatter_rows(F.linear(x, layer.weight), tp)  # (N/tp, H)
    return out if layer.bias is None else out + layer.bias


def vocab_embedding(tokens: torch.Tensor, tp: TensorParallel, layer: Weight, first_row: int) -> torch.Tensor:
    """(N,) token ids → (N/tp, H); the weight holds the rows from `first_row` on, other rows are another rank's."""
    if tp.size == 1:
        return F.embedding(tokens, layer.weight)
    rows = tokens - first_row
    foreign = (rows < 0) | (rows >= layer.weight.shape[0])
    found = F.embedding(rows.masked_fill(foreign, 0), layer.weight)  # (N, H)
    return scatter_rows(found.masked_fill(foreign[:, None], 0.0), tp)
