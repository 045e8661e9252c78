"""Dropout whose masks are a pure function of the run's seed, the step, the micro-batch, the layer and the rank's place.

So a resumed run draws what the undisturbed one does, and a recomputed layer what it drew before. Everything that is
dropped is split over tp (tokens between layers, heads in attention), so each tp rank draws masks of its own.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmpipe.layout import Coordinates

Key = tuple[torch.Tensor | int | str, ...]
"""What a mask is drawn for: the micro-batch's seed, the layer, the place in the layer.

The seed is a tensor of one: a compiled layer would be compiled anew for each number.
"""


def micro_batch_seeds(seed: int, step: int, at: Coordinates, num_micro_batches: int) -> torch.Tensor:
    """(M,) int64: a rank's seed of each micro-batch of a step. Stages share it: layers are told apart by number."""
    place = seed, step, at.dp, at.cp, at.tp
    return torch.tensor([_number((*place, i)) for i in range(num_micro_batches)])


def drop(x: torch.Tensor, rate: float, key: Key | None) -> torch.Tensor:
    """x with a share of `rate` of it zeroed and the rest divided by 1 - rate; x itself at rate 0 or without a key."""
    if rate == 0 or key is None:
        return x
    generator = torch.Generator(x.device).manual_seed(_number(key))
    dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(rate, generator=generator)
    return x.masked_fill(dropped, 0.0) / (1 - rate)


@contextmanager
def seeded(key: Key, device: torch.device) -> Iterator[None]:
    """The device's own generator at a state that follows from the key; the one before comes back afterwards.

    For kernels that draw by themselves.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_number(key))
        yield


def _number(key: Key) -> int:
    """63 bits that follow from the key."""
    parts = [int(part) if isinstance(part, torch.Tensor) else part for part in key]
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
