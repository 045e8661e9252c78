"""Attention's windows: by definition on the CPU, and what the GPU's kernel is asked for."""

import pytest
import torch

from llmpipe.model.attention import attend
from llmpipe.model.packed import Packed
from llmpipe.parallel import compat

BOUNDS = torch.tensor([0, 1, 12, 40, 40], dtype=torch.int32)


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(40, heads, 8, generator=generator) for heads in (4, 2, 2))


def by_definition(q, k, v, before: int, after: int) -> torch.Tensor:
    """FlashAttention's words: query i of a document attends to keys i - before to i + after, inclusive; -1: all."""
    position = torch.arange(40)
    document = torch.searchsorted(BOUNDS, position, right=True)
    distance = position[:, None] - position
    seen = (document[:, None] == document) & (distance >= -after) & ((distance <= before) | (before == -1))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)  # (N, heads, D)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 2, 11, 27, 28, 29, 1000])
def test_a_token_sees_the_window_that_ends_with_itself(window: int | None) -> None:
    expected = by_definition(*qkv(), before=-1 if window is None else window - 1, after=0)
    torch.testing.assert_close(attend(*qkv(), Packed(BOUNDS), window), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_the_kernel_is_asked_for_the_same(window: int | None, monkeypatch) -> None:
    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and (max_q, max_k) == (28, 28)
        assert torch.equal(cu_seq_q, BOUNDS) and torch.equal(cu_seq_k, BOUNDS)
        return by_definition(q, k, v, *window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    compat._varlen_options.cache_clear()
    expected = attend(*qkv(), Packed(BOUNDS), window)
    packed = Packed(BOUNDS)
    found = compat.varlen_causal(*qkv(), packed.cu_queries, packed.cu_keys, *packed.longest, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
