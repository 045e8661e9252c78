"""Sequence and context parallelism's two collectives, with their gradients; each is the other's backward.

Tokens are flattened, so the sequence dimension is dim 0 and no transpose is needed.
N tokens, H hidden, tp ranks that share them.
"""

from typing import Any

import torch

from llmpipe.parallel.compat import all_gather_into, reduce_scatter_into
from llmpipe.parallel.groups import Split


def all_gather_rows(x: torch.Tensor, ranks: Split) -> torch.Tensor:
    """(N/tp, H) of each rank → (N, H) on all; no gradient."""
    if ranks.size == 1:
        return x
    out = x.new_empty(x.shape[0] * ranks.size, *x.shape[1:])
    all_gather_into(out, x.contiguous(), group=ranks.group)
    return out


def reduce_scatter_rows(x: torch.Tensor, ranks: Split) -> torch.Tensor:
    """(N, H) partial sums of each rank → each rank's (N/tp, H) of the sum; no gradient."""
    if ranks.size == 1:
        return x
    out = x.new_empty(x.shape[0] // ranks.size, *x.shape[1:])
    reduce_scatter_into(out, x.contiguous(), group=ranks.group)
    return out


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Split) -> torch.Tensor:
        ctx.ranks = ranks
        return reduce_scatter_rows(x, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather_rows(grads[0], ctx.ranks), None


def scatter_rows(x: torch.Tensor, ranks: Split) -> torch.Tensor:
    """`reduce_scatter_rows` whose gradient is gathered: how a row-parallel layer ends."""
    return x if ranks.size == 1 else _ScatterRows.apply(x, ranks)
