"""Rotary position embeddings in half-split (Hugging Face) order. Su et al. 2021.

N tokens, D head_dim.
"""

import torch


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) positions → cos and sin, (N, D) fp32 each."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # (N, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (N, D)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(N, heads, D) turned by each token's angles, computed in x's dtype as transformers does."""
    left, right = x.chunk(2, dim=-1)  # (N, heads, D/2)
    turned = torch.cat([-right, left], dim=-1)  # (N, heads, D)
    return x * cos.to(x.dtype)[:, None] + turned * sin.to(x.dtype)[:, None]
