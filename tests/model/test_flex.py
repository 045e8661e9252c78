"""Flex attention, and the blocks that it is told to look at."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llmpipe.model import flex
from llmpipe.model.attention import attend
from llmpipe.model.packed import Packed
from llmpipe.parallel.groups import ContextParallel

N = 700  # blocks of 128, the last one shorter
BOUNDS = {
    "documents": [0, 1, 130, 300, 640, 700, 700],
    "one": [0, 700],
    "short ones": [*range(0, 700, 7), 700],
    "at a block's edge": [0, 128, 512, 700],
}
WINDOWS = [None, 1, 100, 128, 129, 300, 5000]


def seen_by_definition(bounds: list[int], window: int | None) -> torch.Tensor:
    """(N, N) bool."""
    position = torch.arange(N)
    document = torch.searchsorted(torch.tensor(bounds), position, right=True)
    distance = position[:, None] - position
    return (document[:, None] == document) & (distance >= 0) & (distance < (window or N))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(bounds: list[int], window: int | None) -> None:
    seen = seen_by_definition(bounds, window)
    expected = create_block_mask(lambda b, h, query, key: seen[query, key], None, None, N, N, device="cpu")
    found = flex.block_mask(Packed(torch.tensor(bounds, dtype=torch.int32)), window)
    assert torch.equal(found.to_dense(), expected.to_dense())
    query, key = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    assert torch.equal(found.mask_mod(None, None, query, key), seen)
    assert _full_blocks(found) == _full_blocks(expected)


def _full_blocks(mask) -> set[tuple[int, int]]:
    counts, numbers = mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]
    return {(row, number) for row, count in enumerate(counts) for number in numbers[row, :count].tolist()}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("window", [None, 100])
def test_a_context_ranks_queries_see_keys_that_end_with_them(rank: int, window: int | None) -> None:
    packed = Packed(torch.tensor([0, 300, 640, 700], dtype=torch.int32), ContextParallel(None, 2, rank))
    whole = seen_by_definition([0, 300, 640, 700], window)
    queries = torch.cat([torch.arange(own.start, own.stop) for own in packed.own])
    keys = torch.cat([torch.arange(part.start, part.stop) for part in packed.seen])
    mask = flex.block_mask(packed, window)
    query, key = torch.meshgrid(torch.arange(len(queries)), torch.arange(len(keys)), indexing="ij")
    found = mask.mask_mod(None, None, query, key)
    assert torch.equal(found.sum(dim=1), whole[queries].sum(dim=1))  # every key once, though gathered twice
    assert whole[queries[:, None], keys][found].all()


@pytest.mark.parametrize("window", [None, 100])
def test_it_attends_as_the_cpu_does(window: int | None, monkeypatch) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)  # compiled, it takes half a minute
    torch.manual_seed(0)
    q, k, v = (torch.randn(N, heads, 16) for heads in (4, 2, 2))
    packed = Packed(torch.tensor(BOUNDS["documents"], dtype=torch.int32))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = flex.flex_causal(q, k, v, packed, window)
    torch.testing.assert_close(found, attend(q, k, v, packed, window), rtol=0, atol=1e-5)
