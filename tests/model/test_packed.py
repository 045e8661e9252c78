"""What a context rank's queries see, as the kernels are told it: against attention by definition, of all tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from llmpipe.layout import Layout
from llmpipe.model.attention import _piece_by_piece, attend
from llmpipe.model.packed import Packed
from llmpipe.model.recompute import recomputed
from llmpipe.parallel import compat, context
from llmpipe.parallel.context import gathered_keys
from llmpipe.parallel.groups import ContextParallel, make_groups
from llmpipe.parallel.processes import run_ranks

NUM_TOKENS = 48
DOCUMENTS = {
    "one": [0, 48],
    "many": [0, 1, 2, 5, 11, 30, 31, 47, 48],
    "at the chunks' edges": [0, 6, 12, 24, 36, 48],
    "padded": [0, 7, 29, 48, 48, 48],
}


def by_definition(q, k, v, bounds: list[int], window: int | None) -> torch.Tensor:
    """(N, heads, D): softmax over the tokens of the same document from `window` - 1 before to itself."""
    position = torch.arange(NUM_TOKENS)
    document = torch.searchsorted(torch.tensor(bounds), position, right=True)
    distance = position[:, None] - position
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or NUM_TOKENS))
    return softmax_over(q, k, v, seen)


def softmax_over(q, k, v, seen: torch.Tensor) -> torch.Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attention(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa) -> torch.Tensor:
    """flash_attn_varlen_func's docstring: query i sees keys from i + seqlen_k - seqlen_q - window_size[0] to
    i + seqlen_k - seqlen_q + window_size[1], inclusive; -1: without end."""
    assert enable_gqa and len(cu_q) == len(cu_k) and cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        diagonal = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        keys = torch.arange(k1 - k0)
        left, right = window_size
        seen = (keys <= diagonal + right) & ((keys >= diagonal - left) | (left == -1))
        parts.append(softmax_over(q[q0:q1], k[k0:k1], v[k0:k1], seen))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 5, 13, 1000])
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_each_ranks_queries_see_what_they_may(cp: int, bounds: list[int], window: int | None, monkeypatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_attention)
    monkeypatch.setattr(compat, "_varlen_options", lambda: {"window_size", "enable_gqa"})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(NUM_TOKENS, heads, 8, generator=generator) for heads in (4, 2, 2))
    whole, held = by_definition(q, k, v, bounds, window), []
    for rank in range(cp):
        packed = Packed(torch.tensor(bounds, dtype=torch.int32), ContextParallel(None, cp, rank))
        own = torch.cat([torch.arange(NUM_TOKENS)[part] for part in packed.own])
        keys, values = (torch.cat([x[part] for part in packed.seen]) for x in (k, v))
        on_cpu = _piece_by_piece(q[own], keys, values, packed, window)
        kernel = compat.varlen_causal(q[own], keys, values, packed.cu_queries, packed.cu_keys, *packed.longest, window)
        torch.testing.assert_close(on_cpu, whole[own], rtol=0, atol=1e-6)
        torch.testing.assert_close(kernel, whole[own], rtol=0, atol=1e-6)
        held += own.tolist()
    assert sorted(held) == list(range(NUM_TOKENS))


def gathered(cp: int) -> tuple[np.ndarray, ...]:
    """A rank's gathered K and V, and the gradients of its own K and V under gradients that differ by rank."""
    groups = make_groups(Layout(cp=cp, tp=2, gpus_per_node=2 * cp, device="cpu").resolved(), torch.device("cpu"))
    packed = packed_of(groups.cp)
    own = [torch.cat([x[part] for part in packed.own]).requires_grad_() for x in whole_keys()]
    with gathered_keys(*own, groups.cp, packed.seen) as found:
        torch.autograd.backward(found, upstream(packed, groups.at.cp))
    return tuple(x.detach().numpy() for x in (*found, *(x.grad for x in own)))


def packed_of(cp: ContextParallel) -> Packed:
    return Packed(torch.tensor(DOCUMENTS["many"], dtype=torch.int32), cp)


def whole_keys() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_TOKENS, 2, 3, generator=generator) for _ in range(2)]


def upstream(packed: Packed, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    size = sum(part.stop - part.start for part in packed.seen)
    return [torch.randn(size, 2, 3, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("cp", [2, 4])
def test_keys_are_gathered_and_their_gradients_go_back(cp: int) -> None:
    """As autograd has it of one process that holds all keys and slices them for each rank."""
    places = [packed_of(ContextParallel(None, cp, rank)) for rank in range(cp)]
    whole = [x.requires_grad_() for x in whole_keys()]
    expected = [[torch.cat([x[part] for part in packed.seen]) for x in whole] for packed in places]
    for rank, packed in enumerate(places):
        torch.autograd.backward(expected[rank], upstream(packed, rank))
    for number, found in enumerate(run_ranks(gathered, 2 * cp, cp)):
        rank = number // 2  # tp changes fastest
        grads = [torch.cat([x.grad[part] for part in places[rank].own]) for x in whole]
        for ours, theirs in zip(found, (*expected[rank], *grads), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=0, atol=1e-6)


def kept(recompute: bool) -> tuple[int, int, int]:
    """How many of the gathered tensors live on after the forward pass, and how many there were before and after."""
    groups = make_groups(Layout(cp=2, gpus_per_node=2, device="cpu").resolved(), torch.device("cpu"))
    gather, made = context._gather, []

    def watched(*arguments):
        found = gather(*arguments)
        made.extend(StorageWeakRef(x.untyped_storage()) for x in found)
        return found

    context._gather = watched
    q, k, v = (torch.ones(NUM_TOKENS // 2, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = recomputed(recompute, attend, q, k, v, packed_of(groups.cp))
    alive, before = sum(not storage.expired() for storage in made), len(made)
    out.sum().backward()
    assert all(storage.expired() for storage in made)
    return alive, before, len(made)


@pytest.mark.parametrize("recompute", [False, True])
def test_gathered_keys_are_not_kept_for_the_backward_pass(recompute: bool) -> None:
    assert run_ranks(kept, 2, recompute) == [(0, 2, 4)] * 2


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_ranks_have_the_same_work_in_one_text_and_in_rows_of_one_length(cp: int) -> None:
    """Pairs of a query and a key that it sees: a text of T tokens has T (T + 1) / 2."""
    for rows in (1, 2, 3):
        bounds = torch.arange(0, 48 * rows + 1, 48, dtype=torch.int32)
        work = [
            sum(n * m - n * (n - 1) // 2 for n, m in Packed(bounds, ContextParallel(None, cp, rank)).pieces)
            for rank in range(cp)
        ]
        assert max(work) == min(work) and sum(work) == rows * 48 * 49 // 2
