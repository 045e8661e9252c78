"""Attention by flex attention on GPUs, where the variable-length kernel lacks grouped queries or windows (torch 2.11).

N queries and S keys of all pieces end to end, D head_dim, in blocks of 128 by 128. Dong et al. 2024, arXiv:2412.05496.
"""

from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from llmpipe.model.packed import Packed

if TYPE_CHECKING:  # it takes a while to import, and most attend without it
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
_masks: WeakKeyDictionary[Packed, dict[int | None, "BlockMask"]] = WeakKeyDictionary()


def flex_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None) -> torch.Tensor:
    """q (N, heads, D), k and v (S, kv_heads, D) → (N, heads, D); K and V are not repeated for their queries' heads."""
    masks = _masks.setdefault(packed, {})  # one for all layers
    if window not in masks:
        masks[window] = block_mask(packed, window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N or S, D)
    return _compiled()(q, k, v, block_mask=masks[window], enable_gqa=True)[0].transpose(0, 1)


def block_mask(packed: Packed, window: int | None) -> "BlockMask":
    """Which blocks hold what is seen, and of those that others share, what.

    The keys that a query sees are a run, whose first and last never go back from one query to the next: so a block's
    first and last queries tell, and no mask of N x S is made.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first, last = _seen(packed, window)  # (N,) each
    num_queries, num_keys = map(sum, zip(*packed.pieces, strict=True))
    tops = torch.arange(0, num_queries, BLOCK, device=first.device)
    bottoms = (tops + BLOCK - 1).clamp(max=num_queries - 1)
    starts = torch.arange(0, num_keys, BLOCK, device=first.device)
    ends = starts + BLOCK - 1
    some = (ends >= first[tops, None]) & (starts <= last[bottoms, None])  # (query blocks, key blocks)
    full = (starts >= first[bottoms, None]) & (ends <= last[tops, None])
    full &= (tops + BLOCK <= num_queries)[:, None]  # a short block is no full one
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, query, key: (key >= first[query]) & (key <= last[query]),
        seq_lengths=(num_queries, num_keys),
    )


def _seen(packed: Packed, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) int32 each: the first and the last key that each query sees. A piece's queries and keys end together."""
    queries, keys = packed.cu_queries, packed.cu_keys
    num_queries = sum(number for number, _ in packed.pieces)
    numbers = torch.arange(num_queries, device=queries.device, dtype=torch.int32)
    piece = torch.searchsorted(queries, numbers, right=True, out_int32=True) - 1
    last = numbers + (keys - queries)[piece + 1]
    first = keys[piece]
    return first if window is None else torch.maximum(first, last - window + 1), last


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(query blocks, key blocks) bool → how many key blocks of each, and their numbers, those first; int32."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None, None], numbers.int()[None, None]


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
