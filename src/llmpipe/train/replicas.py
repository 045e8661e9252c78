"""Ranks that hold the same values: do they still? A flipped bit shows in no loss, and stays in checkpoints."""

from collections import Counter

import torch
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.train.optimizer import Optimizer
from llmpipe.train.state import offsets

_CHUNK = 1 << 24  # elements hashed at once
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Held = dict[tuple[str, tuple[int, ...], tuple[int, ...]], int]
"""The hash of each piece that a rank holds: name, where it begins in the full tensor, size."""


def check_replicas(optimizer: Optimizer, step: int) -> None:
    """UserError on all ranks, naming those that disagree, if ranks hold different values of the same piece."""
    held: list[Held] = [{}] * dist.get_world_size()
    dist.all_gather_object(held, _held(optimizer))
    if found := disagreeing(held):
        name, ranks, of = found
        raise UserError(
            f"step {step}: of the ranks {of}, which hold the same values of {name}, {ranks} disagree with the"
            " others: memory or a link of theirs is at fault; look at their machine, and train on without it: a rerun"
            " goes on from the last checkpoint"
        )


def disagreeing(held: list[Held]) -> tuple[str, list[int], list[int]] | None:
    """A piece's name, the ranks that are in the minority and all that hold it; None where all agree.

    Of two that differ nobody can tell which is right: both are named.
    """
    for piece in dict.fromkeys(piece for of_rank in held for piece in of_rank):
        holders = [rank for rank, of_rank in enumerate(held) if piece in of_rank]
        counts = Counter(held[rank][piece] for rank in holders)
        if len(counts) > 1:
            (best, most), (_, second) = counts.most_common(2)
            wrong = [rank for rank in holders if most == second or held[rank][piece] != best]
            return piece[0], wrong, holders
    return None


def _held(optimizer: Optimizer) -> Held:
    return {
        (key, offsets(optimizer, key), tuple(parameter.shape)): hash_bits(parameter.detach())
        for key, parameter in optimizer.parameters.items()
        if parameter.numel()
    }


def hash_bits(tensor: torch.Tensor) -> int:
    """A number in which every bit of the tensor counts: Σ bits · odd number of the place, modulo 2^64."""
    bits = tensor.contiguous().view(_INTS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (2 * places + 1)).sum()
    return int(total)
