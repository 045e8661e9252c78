"""The directories of torch.distributed.checkpoint, Megatron's `torch_dist` among them: where each tensor's chunks lie.

`.metadata` is a pickle: for each name the dtype, the full size and the chunks that cover it; for each chunk the file
(`__RANK_N.distcp`) and the bytes in it, a file of torch.save of their own (see torch_file). Nothing is run, no
tensor is read (https://docs.pytorch.org/docs/stable/distributed.checkpoint.html).
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmpipe.checkpoint.containers.inert import StandIn
from llmpipe.checkpoint.containers.inert_names import find
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import NAMES, is_sizes, read_inert, read_torch_file
from llmpipe.errors import UserError

METADATA = ".metadata"
_DAMAGED = "copy or download the checkpoint again"
_METADATA_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Item:
    """A file of torch.save within a file."""

    file: Path
    start: int  # bytes
    size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: from `offsets` on, `sizes` of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor in chunks, which cover it without overlap."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Container:
    """What a directory holds, by full name; an object is read with `read_torch_file(..., stand_ins=True)`."""

    tensors: dict[str, Sharded]
    objects: dict[str, Item]


def read_distcp(directory: Path) -> Container:
    """The tensors' chunks and the objects, from `.metadata` alone; UserError if it does not fit itself or its files."""
    path = directory / METADATA
    if not path.is_file():
        raise UserError(f"{path} is missing: {_DAMAGED}")
    if path.stat().st_size > _METADATA_BYTES:
        raise UserError(f"{path} has more than {_METADATA_BYTES >> 20} MB: it is no checkpoint's")
    metadata = read_inert(path.read_bytes(), path, find(NAMES, stand_ins=True))
    try:
        return _container(metadata, directory)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what torch.distributed.checkpoint writes ({error}): {_DAMAGED}") from error


def locate(tensor: Sharded, chunk: Chunk) -> StoredTensor:
    """Where a chunk's bytes lie, in the shape of the chunk; reads the small parts of its file of torch.save."""
    stored = read_torch_file(chunk.item.file, start=chunk.item.start, size=chunk.item.size)
    said = f"{chunk.item.file} holds for {tensor.name} at {list(chunk.offsets)}"
    if not isinstance(stored, StoredTensor):
        raise UserError(f"{said} a {type(stored).__name__}, expected a tensor: {_DAMAGED}")
    if stored.dtype == tensor.dtype and stored.shape == chunk.sizes:
        return stored
    if stored.dtype != tensor.dtype or math.prod(stored.shape) != math.prod(chunk.sizes) or not _is_dense(stored):
        raise UserError(
            f"{said} {stored.dtype} {list(stored.shape)}, expected {tensor.dtype} {list(chunk.sizes)}: {_DAMAGED}"
        )
    return replace(stored, shape=chunk.sizes, strides=torch.empty(chunk.sizes, device="meta").stride())


def _is_dense(stored: StoredTensor) -> bool:
    """Whether the elements stand one after the other in order."""
    return torch.empty_strided(stored.shape, stored.strides, device="meta").is_contiguous()


def _container(metadata: StandIn, directory: Path) -> Container:
    items = _items(metadata.state["storage_data"], directory)
    tensors, objects = {}, {}
    for name, entry in metadata.state["state_dict_metadata"].items():
        if "size" in entry.state:
            tensors[name] = _sharded(name, entry.state, items, directory)
        elif (name, None) in items:
            objects[name] = items[name, None]
        else:
            raise UserError(f"{directory / METADATA} says of {name} no place: {_DAMAGED}")
    return Container(tensors, objects)


def _items(storage: dict[StandIn, StandIn], directory: Path) -> dict[tuple[str, tuple[int, ...] | None], Item]:
    """By name and offsets; an object has no offsets."""
    found, sizes = {}, {}
    for key, place in storage.items():
        name, offset, state = key.state["fqn"], key.state.get("offset"), place.state
        if not isinstance(name, str) or not (offset is None or is_sizes(offset)):
            raise TypeError("a place without a name")
        if state.get("transform_descriptors"):
            raise UserError(
                f"{directory} holds {name} compressed ({', '.join(map(str, state['transform_descriptors']))}), expected"
                " plain bytes: save it again without extensions"
            )
        file = _inside(directory, state["relative_path"])
        if file not in sizes:
            sizes[file] = file.stat().st_size if file.is_file() else -1
        start, size = state["offset"], state["length"]
        if sizes[file] < 0 or not is_sizes((start, size)) or start + size > sizes[file]:
            raise UserError(f"{file} is {_ailing(sizes[file])}: {name} should be in it at byte {start}: {_DAMAGED}")
        found[name, offset] = Item(file, start, size)
    return found


def _ailing(size: int) -> str:
    return "missing" if size < 0 else f"truncated ({size} bytes)"


def _inside(directory: Path, name: Any) -> Path:
    """A file directly in the directory."""
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{directory / METADATA} points outside of its directory ({name!r:.99}): {_DAMAGED}")
    return directory / name


def _sharded(name: str, state: dict[str, Any], items: dict[Any, Item], directory: Path) -> Sharded:
    properties, shape = state["properties"].state, state["size"]
    dtype = properties[""][0] if "" in properties else properties["dtype"]
    if not isinstance(dtype, torch.dtype) or not is_sizes(shape):
        raise UserError(f"{directory / METADATA} gives {name} no dtype or no size: {_DAMAGED}")
    boxes = [(chunk.state["offsets"], chunk.state["sizes"]) for chunk in state["chunks"]]
    if wrong := next(_misfits(boxes, shape), None):
        raise UserError(f"{directory / METADATA}: {name} of size {list(shape)} {wrong}: {_DAMAGED}")
    missing = [offsets for offsets, _ in boxes if (name, offsets) not in items]
    if missing:
        raise UserError(f"{directory / METADATA} says of {name} at {list(missing[0])} no place: {_DAMAGED}")
    return Sharded(name, dtype, shape, tuple(Chunk(*box, items[name, box[0]]) for box in boxes))


def _misfits(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> Iterator[str]:
    """What keeps the boxes from covering a tensor of this shape, each element once."""
    for offsets, sizes in boxes:
        if not is_sizes(offsets) or not is_sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            yield "has a chunk of other dimensions"
        elif any(start + size > full for start, size, full in zip(offsets, sizes, shape, strict=True)):
            yield f"has a chunk of {list(sizes)} at {list(offsets)}, outside"
    twice = [list(offsets) for offsets, count in Counter(offsets for offsets, _ in boxes).items() if count > 1]
    if twice:
        yield f"has two chunks at {twice[0]}"
    full = [box for box in boxes if math.prod(box[1])]
    if sum(math.prod(sizes) for _, sizes in full) != math.prod(shape):
        yield "is not covered by its chunks"
    starts, sizes = (np.array([box[which] for box in full]).reshape(len(full), len(shape)) for which in (0, 1))
    for at, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        apart = (starts[at + 1 :] >= start + size) | (start >= starts[at + 1 :] + sizes[at + 1 :])  # (later, dim)
        if not apart.any(axis=1).all():
            yield f"has chunks that overlap the one at {start.tolist()}"
