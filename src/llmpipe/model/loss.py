"""Cross-entropy over a vocabulary that is split over tp ranks, without gathering the logits.

N tokens, V/tp this rank's true vocabulary rows (the last rank may have fewer: nothing is padded).
"""

from typing import Any

import torch
import torch.distributed as dist

from llmpipe.parallel.groups import TensorParallel


class _CrossEntropy(torch.autograd.Function):
    """ℓ = log Σ exp(z) − z[label]: two small reductions, of the maximum, then of (Σ exp, z[label]) together."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, tp: TensorParallel, first_row: int
    ) -> torch.Tensor:
        highest = logits.amax(dim=-1)  # (N,)
        if tp.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp.group)
        shifted = logits - highest[:, None]  # (N, V/tp)
        rows = labels - first_row
        own = (rows >= 0) & (rows < logits.shape[-1])  # is this token's label one of this rank's rows?
        rows = rows.masked_fill(~own, 0)
        at_label = shifted.gather(1, rows[:, None])[:, 0] * own  # (N,)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=-1), at_label])  # (2, N)
        if tp.size > 1:
            dist.all_reduce(sums, group=tp.group)
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), rows, own)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        softmax, rows, own = ctx.saved_tensors
        grad_logits = softmax * grads[0][:, None]  # (N, V/tp)
        grad_logits.scatter_add_(1, rows[:, None], -(grads[0] * own)[:, None])
        return grad_logits, None, None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, tp: TensorParallel, first_row: int) -> torch.Tensor:
    """(N, V/tp) logits of any dtype, (N,) labels → (N,) losses in fp32."""
    return _CrossEntropy.apply(logits.float(), labels, tp, first_row)  # type: ignore[return-value]
