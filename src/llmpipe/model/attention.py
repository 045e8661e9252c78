"""Causal attention within documents: one `attend(q, k, v, packed)` for every backend (design decision 9).

N tokens of all rows and documents end to end, D head_dim.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from llmpipe.parallel.compat import varlen_causal, varlen_has_windows


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
        return steps - self.cu_seqlens[self._documents(num_tokens)]

    def lengths(self, num_tokens: int) -> torch.Tensor:
        """(N,) the length of each token's document."""
        return self.cu_seqlens.diff()[self._documents(num_tokens)]

    def _documents(self, num_tokens: int) -> torch.Tensor:
        """(N,) the number of each token's document."""
        steps = torch.arange(num_tokens, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens, steps, right=True, out_int32=True) - 1


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None = None
) -> torch.Tensor:
    """q (N, heads, D), k and v (N, kv_heads, D) → (N, heads, D); no token sees another document's.

    With a window a token sees that many tokens, the last of which is itself.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and (window is None or varlen_has_windows()):
        return varlen_causal(q, k, v, packed.cu_seqlens, packed.longest, window)
    return _document_by_document(q, k, v, packed, window)


def _document_by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None
) -> torch.Tensor:
    """There is no variable-length kernel for the CPU or for fp32, and a mask over all N costs N² work."""
    sizes = torch.tensor(packed.bounds).diff().tolist()
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_causal(*part, window) for part in parts])


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One document: (T, heads, D) each → (T, heads, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
    if window is not None and window < q.shape[2]:
        return _windowed(q, k, v, window)[0].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """(1, heads, T, D) each: as many queries at a time as the window is wide, so that the work is T · window."""
    parts, length = [], q.shape[2]
    for start in range(0, length, window):
        first, stop = max(0, start - window + 1), min(start + window, length)
        queries = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(first, stop, device=q.device)
        seen = (keys <= queries) & (keys > queries - window)
        q_part, k_part, v_part = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
        parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=seen, enable_gqa=True))
    return torch.cat(parts, dim=2)
