"""Context parallelism: each of cp ranks has its own queries of a micro-batch, and gathers all keys and values.

All-gather attention as of Llama 3 (Dubey et al. 2024, arXiv:2407.21783, §3.3.2): K and V are small where queries share
them, and packed documents need no more than slices of them.
N tokens of a micro-batch, of which a rank holds N/cp (`layout.context_slices`) and sees S; D head_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmpipe.parallel.collectives import all_gather_rows, reduce_scatter_rows
from llmpipe.parallel.compat import saved_tensors_are_hooked
from llmpipe.parallel.groups import ContextParallel


class _GatherKeys(torch.autograd.Function):
    """One collective for K and V together, each way."""

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, cp: ContextParallel, seen: list[slice]
    ) -> tuple[torch.Tensor, ...]:
        ctx.cp, ctx.seen, ctx.num_tokens = cp, seen, k.shape[0] * cp.size
        return _gather(k, v, cp, seen)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = [_spread(grad, ctx.seen, ctx.num_tokens) for grad in grads]  # (N, kv_heads, D) each
        parts = torch.stack([_by_rank(x, ctx.cp.size) for x in whole], dim=1)  # (cp, K or V, N/cp, kv_heads, D)
        grad_k, grad_v = reduce_scatter_rows(parts, ctx.cp)[0]
        return grad_k, grad_v, None, None


def _gather(k: torch.Tensor, v: torch.Tensor, cp: ContextParallel, seen: list[slice]) -> tuple[torch.Tensor, ...]:
    """(N/cp, kv_heads, D) of each rank → (S, kv_heads, D); no gradient."""
    gathered = all_gather_rows(torch.stack([k, v])[None], cp)  # (cp, K or V, N/cp, kv_heads, D)
    whole = [_in_order(x) for x in gathered.unbind(1)]  # (N, kv_heads, D) each
    return tuple(torch.cat([x[part] for part in seen]) for x in whole)


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """(cp, N/cp, ...) by rank → (N, ...) as in the micro-batch; a rank has the chunk of its number from either end."""
    first, second = x.unflatten(1, (2, -1)).unbind(1)  # (cp, N / 2cp, ...) each
    return torch.cat([first, second.flip(0)]).flatten(0, 1)


def _by_rank(x: torch.Tensor, cp: int) -> torch.Tensor:
    """(N, ...) as in the micro-batch → (cp, N/cp, ...) by rank."""
    first, second = x.unflatten(0, (2, cp, -1))  # (cp, N / 2cp, ...) each
    return torch.cat([first, second.flip(0)], dim=1)


def _spread(grad: torch.Tensor, seen: list[slice], num_tokens: int) -> torch.Tensor:
    """(S, ...) of slices that may overlap → (N, ...), added up."""
    whole = grad.new_zeros(num_tokens, *grad.shape[1:])
    for part, x in zip(seen, grad.split([part.stop - part.start for part in seen]), strict=True):
        whole[part] += x
    return whole


class _Again:
    """Saves views of the gathered K and V as where they lie in them, and gathers again for the backward pass."""

    def __init__(self, own: tuple[torch.Tensor, torch.Tensor], cp: ContextParallel, seen: list[slice]):
        self.own, self.cp, self.seen = own, cp, seen
        self.places: list[int] = []
        """Of the gathered K and V."""
        self.gathered: tuple[torch.Tensor, ...] = ()
        self.saved, self.left = 0, 0

    def pack(self, x: torch.Tensor) -> Any:
        place = x.untyped_storage().data_ptr()
        if place not in self.places:
            return x.detach()
        self.saved += 1
        return self.places.index(place), x.shape, x.stride(), x.storage_offset()

    def unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if not self.gathered:
            self.gathered, self.left = _gather(*self.own, self.cp, self.seen), self.saved
        number, *view = saved
        found = self.gathered[number].as_strided(*view)
        self.left -= 1
        if not self.left:
            self.gathered = ()
        return found


@contextmanager
def gathered_keys(
    k: torch.Tensor, v: torch.Tensor, cp: ContextParallel, seen: list[slice]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A rank's (N/cp, kv_heads, D) → (S, kv_heads, D): all ranks' at `seen`, slices of the micro-batch, end to end.

    The gradient goes back to the ranks that hold them, summed. What is computed of them inside keeps none of them for
    the backward pass, where they are gathered again: there a rank has but its share of a long sequence. Recomputation,
    if it is on, does that already.
    """
    gathered = _GatherKeys.apply(k, v, cp, seen)
    if saved_tensors_are_hooked():
        yield gathered  # type: ignore[misc]
        return
    again = _Again((k.detach(), v.detach()), cp, seen)
    again.places = [x.untyped_storage().data_ptr() for x in gathered]  # type: ignore[union-attr]
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        yield gathered  # type: ignore[misc]
