"""Causal attention within documents: one `attend(q, k, v, packed)` for every backend (design decision 9).

N tokens of all rows and documents end to end, D head_dim.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from llmpipe.parallel.compat import varlen_causal


@dataclass(frozen=True)
class Packed:
    """Where documents begin and end among N tokens: `cu_seqlens` (documents + 1,) int32, from 0 to N.

    It may be padded at its end with N, so that the micro-batches of a step have one length.
    """

    cu_seqlens: torch.Tensor

    @cached_property
    def bounds(self) -> list[int]:
        """The boundaries as Python numbers, without padding."""
        return sorted(set(self.cu_seqlens.tolist()))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.cu_seqlens.diff().max())

    def positions(self, num_tokens: int) -> torch.Tensor:
        """(N,) each token's position in its document."""
        steps = torch.arange(num_tokens, device=self.cu_seqlens.device)
        document = torch.searchsorted(self.cu_seqlens, steps, right=True, out_int32=True) - 1
        return steps - self.cu_seqlens[document]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed) -> torch.Tensor:
    """q (N, heads, D), k and v (N, kv_heads, D) → (N, heads, D); no token sees another document's."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return varlen_causal(q, k, v, packed.cu_seqlens, packed.longest)
    return _document_by_document(q, k, v, packed)


def _document_by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed) -> torch.Tensor:
    """There is no variable-length kernel for the CPU or for fp32, and a mask over all N costs N² work."""
    sizes = torch.tensor(packed.bounds).diff().tolist()
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_causal(*part) for part in parts])


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One document: (T, heads, D) each → (T, heads, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
