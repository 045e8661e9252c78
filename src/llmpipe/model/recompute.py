"""Activations that are computed again in the backward pass instead of being kept. Chen et al. 2016, arXiv:1604.06174.

The selective kind is that of Korthikanti et al. 2022, arXiv:2205.05198: what is large and cheap, no product with a
weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class Recompute:
    """What is computed again, in every `every`-th layer, counted over the whole model."""

    kind: Literal["off", "selective", "full"] = "off"
    every: int = 1

    def whole(self, layer: int) -> bool:
        """Whether all of this layer is computed again."""
        return self.kind == "full" and layer % self.every == 0

    def cores(self, layer: int) -> bool:
        """Whether only this layer's attention between its products and its MLP's activation are."""
        return self.kind == "selective" and layer % self.every == 0


def recomputed(on: bool, function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
    """function(*arguments), of whose inner tensors only the arguments are kept if `on`.

    Computing again ends at the last tensor that the backward pass needs: of a linear layer at its end, at its input.
    Masks need no generator's state to come back (dropout.py).
    """
    if not on or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
