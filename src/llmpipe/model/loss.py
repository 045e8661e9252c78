"""Linear cross-entropy over a vocabulary that is split over tp ranks: the head's product and the loss, chunk by chunk.

Neither tokens x vocabulary logits nor their gradient are ever held: a chunk's are made, used and dropped, and the
gradients of hidden states and head are summed up in the same pass (as Liger's, arXiv:2410.10989).

N tokens, n of a chunk, H hidden, V/tp this rank's true vocabulary rows (the last rank may have fewer: nothing is
padded).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from llmpipe.parallel.collectives import all_gather_rows, reduce_scatter_rows
from llmpipe.parallel.compat import engine_runs
from llmpipe.parallel.groups import TensorParallel

CHUNK_TOKENS = 1024
"""Of all tp ranks together. Each chunk reads and writes the head's gradient once, so many small ones are slow."""


@dataclass(frozen=True, slots=True)
class Rows:
    """This rank's rows of a vocabulary."""

    tp: TensorParallel
    first: int

    def chunks(self, num_local_tokens: int) -> Iterator[slice]:
        """Runs of a rank's N/tp tokens, the same on all ranks, each of which takes part in each chunk."""
        size = max(1, CHUNK_TOKENS // self.tp.size)
        for start in range(0, num_local_tokens, size):
            yield slice(start, min(start + size, num_local_tokens))

    def of_chunk(self, values: torch.Tensor, chunk: slice) -> torch.Tensor:
        """(N,) → (n,) of the tokens that a gathered chunk holds: each rank's in turn."""
        return values.view(self.tp.size, -1)[:, chunk].flatten()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        rows: Rows,
        with_grad: bool,
        hits: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros(1, device=x.device)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_head: torch.Tensor | None = None
        for chunk in rows.chunks(x.shape[0]):
            full = all_gather_rows(x[chunk], rows.tp)  # (n, H)
            chunk_labels, chunk_weights = rows.of_chunk(labels, chunk), rows.of_chunk(weights, chunk)  # (n,)
            loss, grad_logits, chunk_hits = _of_chunk(full, head, chunk_labels, chunk_weights, rows, with_grad)
            total += loss
            hits.view(rows.tp.size, -1)[:, chunk] = chunk_hits.view(rows.tp.size, -1)
            if grad_x is None or grad_logits is None:
                continue
            grad_x[chunk] = reduce_scatter_rows(grad_logits @ head, rows.tp)
            if ctx.needs_input_grad[1]:
                grad_head = _add_product(grad_head, grad_logits, full)  # (V/tp, H)
            del grad_logits  # before the next chunk's
        ctx.grad_x, ctx.grad_head = grad_x, None if grad_head is None else grad_head.to(head.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A zero-bubble schedule comes here twice, once for the input and once for the weights. What is given away is
        # let go of: it is as large as the head.
        grad_x = grad_head = None
        wants_x, wants_head = (engine_runs(node) for node, _ in ctx.next_functions[:2])
        if wants_x:
            grad_x, ctx.grad_x = ctx.grad_x.mul_(grads[0][0]), None
        if wants_head:
            grad_head, ctx.grad_head = ctx.grad_head.mul_(grads[0][0]), None
        return grad_x, grad_head, None, None, None, None, None


def _of_chunk(
    full: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, rows: Rows, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Σ weights·ℓ, (), its gradient by the logits, (n, V/tp), of full (n, H), labels and weights (n,), and the hits.

    ℓ = log Σ exp(z) − z[label]: two small reductions over tp, of the maximum, then of (Σ exp, z[label]) together. A
    hit, (n,) bool, is a label that no other token's logit exceeds.
    """
    logits = F.linear(full, head).float()  # (n, V/tp), from here on changed in its place
    highest = logits.amax(dim=-1)  # (n,)
    if rows.tp.size > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=rows.tp.group)
    logits -= highest[:, None]
    at = labels - rows.first
    own = (at >= 0) & (at < logits.shape[-1])  # is this token's label one of this rank's rows?
    at = at.masked_fill(~own, 0)[:, None]
    at_label = logits.gather(1, at)[:, 0] * own  # (n,)
    logits.exp_()
    sums = torch.stack([logits.sum(dim=-1), at_label])  # (2, n)
    if rows.tp.size > 1:
        dist.all_reduce(sums, group=rows.tp.group)
    loss = (sums[0].log() - sums[1]) @ weights
    hits = sums[1] == 0
    if not with_grad:
        return loss, None, hits
    logits.mul_((weights / sums[0])[:, None])  # the softmax, weighted
    return loss, logits.scatter_add_(1, at, -(weights * own)[:, None]).to(full.dtype), hits


def _add_product(total: torch.Tensor | None, grad_logits: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """total + grad_logitsᵀ · full, (V/tp, H), in fp32 from the second chunk on: sums of many in bf16 lose bits."""
    if total is None:
        return grad_logits.t() @ full
    if total.dtype == full.dtype == torch.float32:
        return total.addmm_(grad_logits.t(), full)
    return total.float().add_(grad_logits.t() @ full)


def linear_cross_entropy(
    x: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N/tp, H), head (V/tp, H), labels and weights (N,) → Σ weights·ℓ of all N tokens, (1,) in fp32, and hits.

    hits (N,) bool: is the label what the model finds likeliest? A tie counts. It costs no pass over the vocabulary.
    """
    with_grad = torch.is_grad_enabled() and (x.requires_grad or head.requires_grad)
    hits = torch.zeros_like(labels, dtype=torch.bool)
    loss = _LinearCrossEntropy.apply(x, head, labels, weights, rows, with_grad, hits)
    return loss, hits  # type: ignore[return-value]
