"""Rotary position embeddings in half-split (Hugging Face) order, and the ways of stretching them to longer texts.

Su et al. 2021. The scalings compute as transformers' modeling_rope_utils does, whose keys `Shape.rope_scaling` has.
N tokens, D head_dim.
"""

import math
from typing import Any

import torch

from llmpipe.families import Shape


def rope_table(positions: torch.Tensor, lengths: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) positions, (N,) lengths of the tokens' documents → cos and sin, (N, D) fp32 each."""
    frequencies, factor = _frequencies(lengths, shape)  # (D/2,), or (N, D/2) where they follow from the lengths
    angles = positions.float()[:, None] * frequencies  # (N, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (N, D)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(N, heads, D) turned by each token's angles, computed in x's dtype as transformers does."""
    left, right = x.chunk(2, dim=-1)  # (N, heads, D/2)
    turned = torch.cat([-right, left], dim=-1)  # (N, heads, D)
    return x * cos.to(x.dtype)[:, None] + turned * sin.to(x.dtype)[:, None]


def longest_text(shape: Shape) -> int:
    """How many positions a model is made for: what its scaling stretches the original ones to, where that is more."""
    scaling = shape.rope_scaling or {"factor": 1}
    return max(shape.max_positions, int(scaling["factor"] * _original(shape, scaling)))


def _frequencies(lengths: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, float]:
    """Each pair's angle of one position, and what cos and sin are multiplied by."""
    scaling = shape.rope_scaling or {}
    powers = shape.rope_theta ** _exponents(shape, lengths.device)  # (D/2,)
    match scaling.get("rope_type"):
        case "linear":  # Chen et al. 2023, arXiv:2306.15595
            return 1.0 / powers / scaling["factor"], 1.0
        case "dynamic":
            return _dynamic(lengths, shape, scaling["factor"]), 1.0
        case "llama3":
            return _llama3(1.0 / powers, scaling), 1.0
        case "yarn":
            return _yarn(powers, shape, scaling), _yarn_factor(scaling)
    return 1.0 / powers, 1.0


def _exponents(shape: Shape, device: torch.device) -> torch.Tensor:
    """(D/2,): 2i/D."""
    return torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float() / shape.head_dim


def _original(shape: Shape, scaling: dict[str, Any]) -> int:
    """The positions that the model was pretrained with, by its config."""
    named = scaling.get("rope_type") in ("llama3", "yarn")  # transformers reads it of these kinds alone
    return scaling.get("original_max_position_embeddings", shape.max_positions) if named else shape.max_positions


def _dynamic(lengths: torch.Tensor, shape: Shape, factor: float) -> torch.Tensor:
    """(N, D/2): theta grows with the length of the token's own document, whatever stands beside it in the batch.

    "Dynamic NTK", by bloc97 and emozilla.
    """
    stretch = factor * lengths.clamp(min=shape.max_positions) / shape.max_positions - (factor - 1)  # (N,)
    theta = shape.rope_theta * stretch ** (shape.head_dim / (shape.head_dim - 2))  # (N,)
    return 1.0 / theta[:, None] ** _exponents(shape, lengths.device)


def _llama3(plain: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """(D/2,): long waves slowed down by the factor, short ones left, a ramp between. Llama 3.1."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)  # within the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain


def _yarn(powers: torch.Tensor, shape: Shape, scaling: dict[str, Any]) -> torch.Tensor:
    """(D/2,): the same, by a ramp over the pairs' numbers. Peng et al. 2023, arXiv:2309.00071."""

    def pair_of(turns: float) -> float:  # the pair that turns so often within the original length
        length = _original(shape, scaling)
        return shape.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    high += 0.001 if low == high else 0.0
    pairs = torch.arange(shape.head_dim // 2, dtype=torch.float32, device=powers.device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_factor(scaling: dict[str, Any]) -> float:
    """Yarn's attention factor: given, or from the scaling's factor."""

    def of(scale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * scale * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1.0)
