"""Causal attention within documents: one `attend(q, k, v, packed)` for every backend (design decision 9).

N tokens of all rows and documents end to end, of which each of cp context ranks holds N/cp; D head_dim.
"""

import torch
import torch.nn.functional as F

from llmpipe.model.dropout import Key, seeded
from llmpipe.model.flex import flex_causal
from llmpipe.model.packed import Packed
from llmpipe.parallel.compat import varlen_causal, varlen_takes
from llmpipe.parallel.context import gathered_keys

MOST_MASKED = 1024  # queries at a time: half of what they see of one another is masked, and computed for nothing


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed,
    window: int | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> torch.Tensor:
    """q (N/cp, heads, D), k and v (N/cp, kv_heads, D) → (N/cp, heads, D); no token sees another document's.

    With a window a token sees that many tokens, the last of which is itself. With a key a share of the probabilities
    is dropped.
    """
    if packed.cp.size == 1:
        return _attend(q, k, v, packed, window, dropout, key)
    with gathered_keys(k, v, packed.cp, packed.seen) as (k, v):
        return _attend(q, k, v, packed, window, dropout, key)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed,
    window: int | None,
    dropout: float,
    key: Key | None,
) -> torch.Tensor:
    """q (N/cp, heads, D), k and v (S, kv_heads, D) of the tokens that they see → (N/cp, heads, D)."""
    if dropout and key:  # which the variable-length kernel cannot
        with seeded(key, q.device):
            return _piece_by_piece(q, k, v, packed, window, dropout)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if not varlen_takes(q.shape[1] != k.shape[1], window):
            return flex_causal(q, k, v, packed, window)
        return varlen_causal(q, k, v, packed.cu_queries, packed.cu_keys, *packed.longest, window)
    return _piece_by_piece(q, k, v, packed, window)


def _piece_by_piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None, dropout: float = 0.0
) -> torch.Tensor:
    """There is no variable-length kernel for the CPU or for fp32, and a mask over all N costs N² work."""
    queries, keys = zip(*packed.pieces, strict=True)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_causal(*part, window, dropout) for part in parts])


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, dropout: float) -> torch.Tensor:
    """The last tokens of a text: q (T, heads, D) and k, v (S ≥ T, kv_heads, D), which end together → (T, heads, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T or S, D)
    if q.is_cuda:  # for fp32 and for masks the one CUDA kernel that takes grouped queries keeps heads x T x S
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    num_keys = k.shape[2]
    if q.shape[2] < num_keys or (window is not None and window < num_keys):
        return _masked(q, k, v, window or num_keys, dropout)[0].transpose(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, dropout: float) -> torch.Tensor:
    """(1, heads, T or S, D) each: as many queries at a time as the window is wide, so that the work is T · window."""
    parts, before = [], k.shape[2] - q.shape[2]
    for q_part in q.split(min(window, MOST_MASKED), dim=2):
        stop = before + q_part.shape[2]
        first = max(0, before - window + 1)
        k_part, v_part = k[:, :, first:stop], v[:, :, first:stop]
        bias = _bias(q_part.shape[2], stop - first, window, like=q)
        out = F.scaled_dot_product_attention(q_part.flip(2), k_part, v_part, bias, dropout, enable_gqa=True)
        parts.append(out.flip(2))
        before = stop
    return torch.cat(parts, dim=2)


def _bias(num_queries: int, num_keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(queries, the last one first, keys), which end together: 0 where a query sees a key, else -inf.

    In this order it is the same wherever i + j is, and so but a view of one row: a layer keeps no masks for its
    backward pass.
    """
    distance = torch.arange(num_keys - 1, -num_queries, -1, device=like.device)  # of query and key, by i + j
    row = like.new_zeros(len(distance)).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    bias = row.as_strided((num_queries, num_keys), (1, 1))
    return bias.contiguous() if like.is_cuda else bias  # its kernels want the rows aligned
