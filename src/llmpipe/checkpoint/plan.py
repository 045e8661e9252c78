"""What a conversion would do, from the headers alone: every tensor's route, the disk and the time it needs."""

import shutil
from pathlib import Path

import torch

from llmpipe.checkpoint.mover import Filled
from llmpipe.checkpoint.source import TensorSource
from llmpipe.families import FAMILIES, Shape

# Measured in docs/numbers/conversion.md: 13.5 GB with SHA-256 of everything, a virtual disk, two cores.
BYTES_PER_SECOND = 0.4e9


Planned = dict[str, list[Filled]]
"""The files of weights that would be written, with their tensors."""


def plan(source: TensorSource, kind: str, output: Path, files: Planned, others: list[str]) -> list[str]:
    """In lines: the model, each file with each tensor and where its bytes come from, the totals.

    `others`: the names of files that are written beside the weights.
    """
    shape, keys = source.shape, source.keys()
    parameters = sum(torch.Size(_size(source, key)).numel() for key in keys)
    read = sum(torch.Size(_size(source, key)).numel() * source.dtype(key).itemsize for key in keys)
    written = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
    stored = ", ".join(sorted({_name(source.dtype(key)) for key in keys}))
    lines = [
        f"would read {source.path} ({kind}): {len(keys)} tensors, {parameters:,} parameters, {stored}, {read:,} bytes"
    ]
    lines += [f"  {name}: {getattr(shape, name)}" for name in Shape.__dataclass_fields__]
    for file, tensors in files.items():
        lines += ["", f"{output / file}, {sum(tensor.bytes for tensor in tensors):,} bytes"]
        lines += [f"  {_route(source, tensor)}" for tensor in tensors]
    free = shutil.disk_usage(next(parent for parent in (output, *output.absolute().parents) if parent.exists())).free
    short = "" if free > written else f", which is {written - free:,} too few"
    return [
        *lines,
        "",
        f"would write {output}: {', '.join(sorted(others))}, and weights of {written:,} bytes in {len(files)} files",
        f"disk: {written:,} bytes needed, {free:,} free{short}",
        f"time: about {max(1, round((read + written) / 2 / BYTES_PER_SECOND)):,} s at {BYTES_PER_SECOND / 1e9:g} GB/s",
    ]


def _route(source: TensorSource, tensor: Filled) -> str:
    """One tensor: its type and sizes, and the stored tensors that its bytes come from."""
    keys = dict.fromkeys(part.key for part in tensor.stored.parts)
    origins: dict[str, None] = {}
    for key in keys:
        for block in source.blocks(key) or []:
            hit = any(part.key == key and block.move(part.rows, part.cols) for part in tensor.stored.parts)
            origins |= {f"{block.file.name}:{block.name}": None} if hit else {}
        if source.blocks(key) is None:
            origins[f"computed: {key}"] = None
    types = {source.dtype(key) for key in keys}
    cast = "" if types == {tensor.dtype} else f", cast from {', '.join(sorted(map(_name, types)))}"
    sizes = "x".join(map(str, tensor.stored.shape))
    return f"{tensor.stored.name} {_name(tensor.dtype)} {sizes}{cast} <- {', '.join(origins)}"


def _size(source: TensorSource, key: str) -> tuple[int, ...]:
    return FAMILIES[source.shape.family].row(key, source.shape).shape(source.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
