"""Names of torch that are private or differ between 2.11 and 2.13; nowhere else in llmpipe.

But for train/piece.py, which speaks a protocol of torch's checkpoints, and is imported by trainings alone.
"""

import inspect
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:  # else whoever attends would wait for FSDP2
    from torch.distributed.fsdp import FSDPModule

# 2.13 warns of the older names, 2.11 lacks the newer ones.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def engine_runs(node: Any) -> bool:
    """Whether the backward pass that is under way goes through a node of the graph; one half of it leaves some out."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it says so of a leaf whose gradient torch.autograd.grad was asked for
        return True


def reduced_in(module: "FSDPModule") -> torch.dtype:
    """The type in which FSDP2 sums a module's gradients over ranks."""
    dtype = module._get_fsdp_state()._mp_policy.reduce_dtype
    assert dtype
    return dtype


def set_timeouts(timeout: timedelta) -> None:
    """How long an operation may take in each process group there is: but for the first, torch gives them 30 minutes."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def varlen_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    most_queries: int,
    most_keys: int,
    window: int | None = None,
) -> torch.Tensor:
    """torch's variable-length flash kernel, causal, CUDA only: q (N, heads, D), k, v (S, kv_heads, D) → (N, heads, D).

    Of a piece with more keys than queries the last query sees all keys: FlashAttention's mask is aligned to the bottom
    right since its version 2.1. A token sees the `window` tokens that end with itself: the kernel counts those before
    it. For what `varlen_takes`.
    """
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if window is None else window - 1
    options: dict[str, Any] = (
        {"window_size": (before, 0)} if "window_size" in _varlen_options() else {"is_causal": True}
    )
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, cu_queries, cu_keys, most_queries, most_keys, **options)  # type: ignore[return-value]


def varlen_takes(grouped: bool, window: int | None) -> bool:
    """Whether this torch's variable-length kernel has what is asked: 2.11's has no grouped queries and no windows."""
    known = _varlen_options()
    return (not grouped or "enable_gqa" in known) and (window is None or "window_size" in known)


@cache
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def saved_tensors_are_hooked() -> bool:
    """Whether something decides already what the backward pass finds: recomputation, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]
