"""Bytes accounted for: every tensor of the source is found once on the other side, whatever it is called there.

No table of names is used. A tensor's fingerprint is the sum, modulo 2^64, of a hash of each of its rows: equal for two
tensors that hold the same rows bit for bit in any order, which is all that the formats differ in (the rotary permute
moves whole rows). Order and place are the forward's business.
"""

from collections import Counter
from pathlib import Path
from typing import Protocol

import torch

from llmpipe.progress import progress
from llmpipe.verify.card import Check, Findings, at_most


class Inventory(Protocol):
    """A model read tensor by tensor in its format's own names."""

    path: Path

    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> torch.Tensor: ...
    def hyper_parameters(self) -> dict[str, float | str]: ...


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


def storage_types(side: Inventory) -> Counter[torch.dtype]:
    """The types that a side stores its tensors in, with their counts."""
    return Counter(side.dtype(name) for name in side.names())


def lossy(source: torch.dtype, stored: torch.dtype) -> bool:
    """Whether writing `source` values as `stored` rounds them."""
    return torch.promote_types(source, stored) != stored


def rounded_to(reference: Inventory, subject: Inventory) -> torch.dtype | None:
    """The type that convert rounded the source's values to; None if it kept them."""
    stored = list(storage_types(subject))
    rounds = len(stored) == 1 and any(lossy(dtype, stored[0]) for dtype in storage_types(reference))
    return stored[0] if rounds else None


def inventory_checks(reference: Inventory, subject: Inventory) -> Findings:
    """The rows of the card on the bytes, and the first tensor that has no partner."""
    names, stored = subject.names(), storage_types(subject)
    found: dict[tuple[torch.dtype, Print], list[str]] = {}
    elements, rounding, missing = [0, 0], 0.0, []
    with progress("verify", len(names) + len(reference.names()), "tensors") as shown:
        for name in names:
            tensor = subject.read(name)
            elements[1] += tensor.numel()
            found.setdefault((tensor.dtype, fingerprint(tensor, tensor.dtype)), []).append(name)
            shown.add(1, name)
        for name in reference.names():
            tensor = reference.read(name)
            elements[0] += tensor.numel()
            dtype = _take_partner(tensor, found, stored)
            if dtype is None:
                missing.append(name)
            else:
                rounding = max(rounding, largest_rounding(tensor, dtype))
            shown.add(1, name)
    left = [name for name in names if any(name in partners for partners in found.values())]
    return [
        at_most("parameters", abs(elements[0] - elements[1]), 0, f"{elements[1]:,}, the source has {elements[0]:,}"),
        at_most("tensors without a partner", len(missing) + len(left), 0, _unmatched(len(names), missing, left)),
        Check("storage", rounding, None, "pass", _storage(storage_types(reference), stored)),
    ], next(iter(missing + left), None)


def _take_partner(
    tensor: torch.Tensor, found: dict[tuple[torch.dtype, Print], list[str]], stored: Counter[torch.dtype]
) -> torch.dtype | None:
    """Strike out one tensor of the subject that holds these rows, and return its type; its own type is tried first."""
    for dtype in sorted(stored, key=lambda dtype: dtype != tensor.dtype):
        partners = found.get((dtype, fingerprint(tensor, dtype)), [])
        if partners:
            partners.pop(0)
            return dtype
    return None


def largest_rounding(tensor: torch.Tensor, stored: torch.dtype) -> float:
    """The largest relative change that storing the values as `stored` makes."""
    if not lossy(tensor.dtype, stored):
        return 0.0
    exact = tensor.double()
    change = (tensor.to(stored).double() - exact).abs() / exact.abs().clamp(min=torch.finfo(stored).tiny)
    return float(change.max())


def _unmatched(count: int, missing: list[str], left: list[str]) -> str:
    if not missing and not left:
        return f"each of {count} tensors holds the rows of one of the source's, bit for bit as stored"
    parts = [f"{what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for what, names in
             (("of the source alone:", missing), ("not of the source:", left)) if names]  # fmt: skip
    return "rows compared bit for bit; " + "; ".join(parts)


def _storage(sources: Counter[torch.dtype], stored: Counter[torch.dtype]) -> str:
    given, kept = (
        ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types)) for types in (sources, stored)
    )
    if given == kept:
        return f"{given} on both sides"
    if not any(lossy(source, dtype) for source in sources for dtype in stored):
        return f"{given} stored as {kept}, without rounding"
    return f"{given} rounded to {kept}: the largest relative change; the forward's reference is rounded too"


def hyper_parameter_checks(reference: Inventory, subject: Inventory) -> Findings:
    """The row of the card on the hyper-parameters, and the first that differs."""
    theirs, ours = reference.hyper_parameters(), subject.hyper_parameters()
    wrong = [
        f"{name}: {_shown(ours[name])}, the source has {_shown(value)}"
        for name, value in theirs.items()
        if name in ours and ours[name] != value  # a foreign format may not say a setting; Hugging Face's says all
    ]
    detail = "; ".join(wrong) or ", ".join(f"{name} {_shown(value)}" for name, value in ours.items())
    return [at_most("hyper-parameters that differ", len(wrong), 0, detail)], next(iter(wrong), None)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
