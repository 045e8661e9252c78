"""Bytes accounted for: every tensor of the source is found once on the other side, whatever it is called there.

No table of names is used. A tensor's fingerprint is the sum, modulo 2^64, of a hash of each of its rows: equal for two
tensors that hold the same rows bit for bit in any order, which is all that the formats differ in (the rotary permute
moves whole rows). Order and place are the forward's business.
"""

from collections import Counter
from pathlib import Path
from typing import Protocol

import torch

from llmpipe.errors import UserError
from llmpipe.progress import progress
from llmpipe.verify.card import Check, at_most


class Inventory(Protocol):
    """A model read tensor by tensor in its format's own names."""

    path: Path

    def names(self) -> list[str]: ...
    def read(self, name: str) -> torch.Tensor: ...
    def hyper_parameters(self) -> dict[str, float]: ...


Print = tuple[tuple[int, ...], int]
_MIX = 0x2545F4914F6CDD1D
_CHUNK = 1 << 22
_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def fingerprint(tensor: torch.Tensor, dtype: torch.dtype) -> Print:
    """The tensor's shape, and a hash of its rows as `dtype` whatever their order; a vector is one row."""
    rows = tensor if tensor.ndim > 1 else tensor[None]
    generator = torch.Generator().manual_seed(rows.shape[1])
    odd = torch.randint(-(1 << 62), 1 << 62, (rows.shape[1],), generator=generator) | 1
    total = 0
    for part in rows.split(max(1, _CHUNK // rows.shape[1])):
        bits = part.to(dtype).contiguous().view(_BITS[dtype]).to(torch.int64)  # (rows, columns)
        sums = (bits * odd).sum(1)  # wraps at 64 bits, as a hash may
        total += int(((sums ^ (sums >> 29)) * _MIX).sum())
    return tuple(tensor.shape), total % (1 << 64)


def storage_type(side: Inventory) -> torch.dtype:
    """The one type that a side stores its tensors in; UserError if there are several."""
    types = Counter(side.read(name).dtype for name in side.names())
    if len(types) > 1:
        raise UserError(
            f"{side.path} stores tensors in several types: {', '.join(f'{n} {t}' for t, n in types.items())}"
        )
    return next(iter(types))


def lossy(source: torch.dtype, stored: torch.dtype) -> bool:
    """Whether writing `source` values as `stored` rounds them."""
    return torch.promote_types(source, stored) != stored


def inventory_checks(reference: Inventory, subject: Inventory) -> tuple[list[Check], str | None]:
    """The rows of the card on the bytes, and the first tensor that has no partner."""
    names, stored = subject.names(), storage_type(subject)
    found: dict[Print, list[str]] = {}
    elements, rounding, sources, missing = [0, 0], 0.0, Counter(), []
    with progress("verify", len(names) + len(reference.names()), "tensors") as shown:
        for name in names:
            tensor = subject.read(name)
            elements[1] += tensor.numel()
            found.setdefault(fingerprint(tensor, stored), []).append(name)
            shown.add(1, name)
        for name in reference.names():
            tensor = reference.read(name)
            elements[0] += tensor.numel()
            sources[tensor.dtype] += 1
            rounding = max(rounding, largest_rounding(tensor, stored))
            partners = found.get(fingerprint(tensor, stored), [])
            if partners:
                partners.pop()
            else:
                missing.append(name)
            shown.add(1, name)
    left = [name for partners in found.values() for name in partners]
    return [
        at_most("parameters", abs(elements[0] - elements[1]), 0, f"{elements[1]:,}, the source has {elements[0]:,}"),
        at_most("tensors without a partner", len(missing) + len(left), 0, _unmatched(len(names), missing, left)),
        Check("storage", rounding, None, "pass", _storage(sources, stored)),
    ], next(iter(missing + left), None)


def largest_rounding(tensor: torch.Tensor, stored: torch.dtype) -> float:
    """The largest relative change that storing the values as `stored` makes."""
    if not lossy(tensor.dtype, stored):
        return 0.0
    exact = tensor.double()
    change = (tensor.to(stored).double() - exact).abs() / exact.abs().clamp(min=torch.finfo(stored).tiny)
    return float(change.max())


def _unmatched(count: int, missing: list[str], left: list[str]) -> str:
    if not missing and not left:
        return f"each of {count} tensors holds the rows of one of the source's, bit for bit"
    parts = [f"{what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for what, names in
             (("of the source alone:", missing), ("not of the source:", left)) if names]  # fmt: skip
    return "rows compared bit for bit; " + "; ".join(parts)


def _storage(sources: Counter[torch.dtype], stored: torch.dtype) -> str:
    given = ", ".join(str(dtype).removeprefix("torch.") for dtype in sources)
    kept = str(stored).removeprefix("torch.")
    if given == kept:
        return f"{kept} on both sides"
    if not any(lossy(dtype, stored) for dtype in sources):
        return f"{given} stored as {kept}, without rounding"
    return f"{given} rounded to {kept}: the largest relative change; the forward's reference is rounded too"


def hyper_parameter_checks(reference: Inventory, subject: Inventory) -> tuple[list[Check], str | None]:
    """The row of the card on the hyper-parameters, and the first that differs."""
    theirs, ours = reference.hyper_parameters(), subject.hyper_parameters()
    wrong = [
        f"{name}: {ours[name]:g}, the source has {value:g}" for name, value in theirs.items() if ours[name] != value
    ]
    detail = "; ".join(wrong) or ", ".join(f"{name} {value:g}" for name, value in ours.items())
    return [at_most("hyper-parameters that differ", len(wrong), 0, detail)], next(iter(wrong), None)
