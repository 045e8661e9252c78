"""Bytes accounted for: every tensor of the source is found once on the other side, whatever it is called there.

No table of names is used, but for the layer's number, which stands in a tensor's name in every format. A fingerprint
is a hash of a tensor's rows, bit for bit and in their order. The formats differ in one order alone, the rotary one: a
partner may have each head's rows half after half where the source has them as neighbours. Which of both is right, and
which of a layer's tensors is which, is the forward's business.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
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


Bounds = Callable[[str], tuple[torch.Tensor, torch.Tensor] | None]
"""The least and the most that a tensor of the source may hold, of those that were computed; None of all others."""
Print = tuple[tuple[int, ...], int]
_Found = dict[tuple[int | None, torch.dtype, Print], list[str]]
"""The subject's names by layer, stored type and fingerprint."""
_LAYER = re.compile(r"\b(?:layers|h)[./](\d+)[./]")
_MIX = 0x2545F4914F6CDD1D
_CHUNK = 1 << 22
_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def fingerprint(tensor: torch.Tensor, dtype: torch.dtype) -> Print:
    """The tensor's shape, and a hash of its rows as `dtype` in their order; a vector is one row."""
    return tuple(tensor.shape), _ordered(row_hashes(tensor, dtype))


def rotary_fingerprints(tensor: torch.Tensor, dtype: torch.dtype, head_dim: int) -> list[Print]:
    """Its fingerprint, and those with each head's rows in the other rotary order, which may be on either side."""
    rows = row_hashes(tensor, dtype)
    orders = rotary_orders(rows, head_dim) if tensor.ndim == 2 else [rows]
    return [(tuple(tensor.shape), _ordered(order)) for order in orders]


def rotary_orders(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """Rows as they are, and with each head's in the other rotary order, which may be on either side."""
    if head_dim % 2 or len(rows) % head_dim:
        return [rows]
    heads = rows.view(-1, head_dim, *rows.shape[1:])  # (H, D, ...)
    return [rows, *(heads.unflatten(1, sizes).transpose(1, 2).reshape(rows.shape) for sizes in ((-1, 2), (2, -1)))]


def row_hashes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A hash of each row as `dtype`, (rows,) int64."""
    rows = tensor if tensor.ndim > 1 else tensor[None]
    odd = _odd(rows.shape[1])
    found = []
    for part in rows.split(max(1, _CHUNK // rows.shape[1])):
        bits = part.to(dtype).contiguous().view(_BITS[dtype]).to(torch.int64)  # (rows, columns)
        sums = (bits * odd).sum(1)  # wraps at 64 bits, as a hash may
        found.append((sums ^ (sums >> 29)) * _MIX)
    return torch.cat(found)


def _ordered(hashes: torch.Tensor) -> int:
    return int((hashes * _odd(len(hashes))).sum()) % (1 << 64)


def _odd(count: int) -> torch.Tensor:
    """Fixed odd numbers."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(1 << 62), 1 << 62, (count,), generator=generator) | 1


def layer_number(name: str) -> int | None:
    """The layer in a tensor's name, in any format; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


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


def inventory_checks(reference: Inventory, subject: Inventory, bounds: Bounds | None = None) -> Findings:
    """The rows of the card on the bytes, and the first tensor that has no partner.

    `bounds`: of a merged adapter's sums, which are one of two neighbouring values where rounding is in doubt.
    """
    names, stored = subject.names(), storage_types(subject)
    head_dim = int(next((side["head size"] for side in _settings(reference, subject) if "head size" in side), 1))
    found: _Found = {}
    elements, rounding, missing = [0, 0], 0.0, []
    with progress("verify", len(names) + len(reference.names()), "tensors") as shown:
        for name in names:
            tensor = subject.read(name)
            elements[1] += tensor.numel()
            place = (layer_number(name), tensor.dtype, fingerprint(tensor, tensor.dtype))
            found.setdefault(place, []).append(name)
            shown.add(1, name)
        for name in reference.names():
            tensor = reference.read(name)
            elements[0] += tensor.numel()
            dtype = _take_partner(layer_number(name), tensor, found, stored, head_dim)
            if dtype is None and bounds and (between := bounds(name)):
                dtype = _take_between(layer_number(name), between, found, subject, head_dim)
            if dtype is None:
                missing.append(name)
            else:
                rounding = max(rounding, largest_rounding(tensor, dtype))
            shown.add(1, name)
    left = [name for name in names if any(name in partners for partners in found.values())]
    return [
        at_most("parameters", abs(elements[0] - elements[1]), 0, f"{elements[1]:,}, the source has {elements[0]:,}"),
        at_most("tensors without a partner", len(missing) + len(left), 0, _unmatched(len(names), missing, left)),
        _storage_check(rounding, _storage(storage_types(reference), stored)),
    ], next(iter(missing + left), None)


def _take_partner(
    layer: int | None, tensor: torch.Tensor, found: _Found, stored: Counter[torch.dtype], head_dim: int
) -> torch.dtype | None:
    """Strike out one tensor of the subject that holds these rows, and return its type; its own type is tried first."""
    for dtype in sorted(stored, key=lambda dtype: dtype != tensor.dtype):
        for hashed in rotary_fingerprints(tensor, dtype, head_dim):
            if partners := found.get((layer, dtype, hashed), []):
                partners.pop(0)
                return dtype
    return None


def _take_between(
    layer: int | None, bounds: tuple[torch.Tensor, torch.Tensor], found: _Found, subject: Inventory, head_dim: int
) -> torch.dtype | None:
    """Strike out one tensor of the subject whose values lie within bounds, and return its type."""
    for (number, dtype, (shape, _)), partners in found.items():
        if number == layer and shape == tuple(bounds[0].shape) and partners:
            tensor = subject.read(partners[0])
            least, most = (rotary_orders(bound.to(dtype), head_dim) for bound in bounds)
            if any(bool(((a <= tensor) & (tensor <= b)).all()) for a, b in zip(least, most, strict=True)):
                partners.pop(0)
                return dtype
    return None


def _settings(*sides: Inventory) -> list[dict[str, float | str]]:
    return [side.hyper_parameters() for side in sides]


def largest_rounding(tensor: torch.Tensor, stored: torch.dtype) -> float:
    """The largest relative change that storing the values as `stored` makes."""
    if not lossy(tensor.dtype, stored):
        return 0.0
    exact = tensor.double()
    change = (tensor.to(stored).double() - exact).abs() / exact.abs().clamp(min=torch.finfo(stored).tiny)
    return float(change.max())


def _unmatched(count: int, missing: list[str], left: list[str]) -> str:
    if not missing and not left:
        return f"each of {count} tensors holds the rows of one of the source's in its layer, bit for bit as stored"
    parts = [f"{what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for what, names in
             (("of the source alone:", missing), ("not of the source:", left)) if names]  # fmt: skip
    return "rows compared bit for bit; " + "; ".join(parts)


def _storage_check(rounding: float, detail: str) -> Check:
    """No limit but one: a value that its new type cannot hold is lost."""
    if math.isfinite(rounding):
        return Check("storage", rounding, None, "pass", detail)
    return Check("storage", None, None, "fail", f"{detail}; values are not finite in it: take bf16 or fp32")


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
    unsaid = [name for name in ours if name not in theirs and not name.endswith(" token")]
    detail += f"; not said by the source, and so not compared: {', '.join(unsaid)}" if unsaid else ""
    return [at_most("hyper-parameters that differ", len(wrong), 0, detail)], next(iter(wrong), None)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
