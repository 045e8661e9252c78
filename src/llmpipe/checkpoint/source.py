"""Where weights come from: one way to read every format, and what all readers check and cut."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from llmpipe.errors import UserError
from llmpipe.families import Shape

if TYPE_CHECKING:
    from llmpipe.checkpoint.blocks import Block

Slices = tuple[slice, ...]


class TensorSource(Protocol):
    """A model's tensors by our names, in our layout: half-split rotary order, separate q, k, v and gate, up.

    Opening one proves that every tensor is there, in its right shape, and that nothing is left over.
    """

    path: Path
    shape: Shape
    tokenizer_place: Path
    """Where its tokenizer is looked for: `path`, but for a model that an adapter gave another."""

    def keys(self) -> list[str]:
        """Our full names, in the family's order."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """The stored type of a tensor."""
        ...

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        """A fresh tensor in the stored type; `slices` are in the full tensor's coordinates, one per dimension."""
        ...

    def blocks(self, key: str) -> "list[Block] | None":
        """Where its elements lie in files, each once; None if it is computed and `read` alone gives it."""
        ...


class OtherShape(UserError):
    """Weights of another shape than is expected of them; `different` has each field."""

    def __init__(self, path: Path, different: str):
        super().__init__(
            f"{path} is not of the shape that was asked for: {different}: name the right shape or leave it out"
        )
        self.different = different


def check_expected(found: Shape, expected: Shape, path: Path) -> None:
    """OtherShape with each field that differs."""
    different = [
        f"{name} is {getattr(found, name)!r}, expected {getattr(expected, name)!r}"
        for name in Shape.__dataclass_fields__
        if getattr(found, name) != getattr(expected, name)
    ]
    if different:
        raise OtherShape(path, "; ".join(different))


def check_tensors(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """UserError with the list if a tensor is missing, left over or of a wrong shape; names are the source's own."""
    wrong = [f"missing: {name}" for name in expected if name not in found]
    wrong += [f"left over: {name}" for name in found if name not in expected]
    wrong += [
        f"wrong shape: {name} is {list(found[name])}, expected {list(size)}"
        for name, size in expected.items()
        if name in found and found[name] != size
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise UserError(f"{path}: {len(wrong)} tensors do not fit the model:\n  " + "\n  ".join(wrong[:20]) + more)


def resolved(slices: Slices | None, sizes: tuple[int, ...]) -> Slices:
    """The slices with plain starts and stops; None is the whole tensor."""
    return tuple(
        slice(*part.indices(size)) for part, size in zip(slices or (slice(None),) * len(sizes), sizes, strict=True)
    )


def sizes_of(slices: Slices) -> tuple[int, ...]:
    """The sizes of the part that resolved slices cut out."""
    return tuple(part.stop - part.start for part in slices)


def overlap(region: Slices, wanted: Slices) -> tuple[Slices, Slices] | None:
    """What a stored region holds of the wanted one: slices within the region and within the wanted; None for nothing.

    Both are in the full tensor's coordinates, with plain starts and stops.
    """
    inside, target = [], []
    for have, want in zip(region, wanted, strict=True):
        start, stop = max(have.start, want.start), min(have.stop, want.stop)
        if start >= stop:
            return None
        inside.append(slice(start - have.start, stop - have.start))
        target.append(slice(start - want.start, stop - want.start))
    return tuple(inside), tuple(target)
