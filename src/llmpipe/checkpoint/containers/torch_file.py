"""The zip files of torch.save (`.pth`, `.pt`, `.bin`): where each tensor's bytes lie. Nothing is run, no tensor read.

A file holds `NAME/data.pkl`, the pickled object in which each tensor is a view (offset, size, strides in elements) of a
storage, and the storages' bytes as uncompressed records `NAME/data/KEY`
(https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from llmpipe.checkpoint.containers.inert import Damaged, Maker, Refused, StandIn, unpickle
from llmpipe.checkpoint.containers.inert_names import find
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.zip_records import Record, crc_of, read_records
from llmpipe.errors import UserError

STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
    "CharStorage": torch.int8, "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "ShortStorage": torch.int16, "UntypedStorage": torch.uint8,
}  # fmt: skip
_DIMENSIONS = 64  # torch has no more
_NODES, _DEPTH = 1_000_000, 100  # of one file
_THREADS = 4
_PICKLE_BYTES = 1 << 30  # those of the largest models have a few MB


@dataclass(frozen=True, slots=True)
class _Storage:
    file: Path
    record: Record
    dtype: torch.dtype
    numel: int


def read_torch_file(path: Path, stand_ins: bool = False, start: int = 0, size: int | None = None) -> Any:
    """The object that torch.save wrote, with a StoredTensor for each tensor and an OrderedDict's items as a dict.

    Names beyond tensors, Namespace, numpy and plain Python values are refused; with `stand_ins` foreign ones (not
    Python's own) become a StandIn instead. `size` bytes from `start` on are read. UserError if the file is refused,
    damaged or of another kind.
    """
    with path.open("rb") as file:
        _check_kind(file, path, start)
        records = read_records(file, path, start, size)
        base = _base(records, path)
        _check_byte_order(file, records.get(f"{base}/byteorder"), path)
        data = _pickle(file, path, records, f"{base}/data.pkl")

    def storage(key: Any) -> _Storage:
        kind, dtype, name, _, numel = key  # the location, a device, does not matter
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not is_sizes((numel,)):
            raise Damaged("a storage without a type or a size")
        if not isinstance(name, str) or f"{base}/data/{name}" not in records:
            raise Damaged(f"the storage {name!r} is missing")
        record = records[f"{base}/data/{name}"]
        if numel * dtype.itemsize > record.size:
            raise Damaged(f"the storage {name} has {record.size} bytes, expected {numel * dtype.itemsize}")
        return _Storage(path, record, dtype, numel)

    return read_inert(data, path, find(NAMES, stand_ins), storage)


def archive_name(path: Path) -> str:
    """The folder inside the archive: the file's name, without its suffix, when torch.save wrote it; else "archive"."""
    with path.open("rb") as file:
        _check_kind(file, path, 0)
        return _base(read_records(file, path), path)


def read_inert(
    data: bytes, path: Path, find: Callable[[str, str], Any], storage: Callable[[Any], Any] | None = None
) -> Any:
    """`unpickle`, whose errors name the file and what to do."""
    try:
        return unpickle(data, find, storage)
    except Refused as refused:
        raise UserError(
            f"{path} is refused: it asks for {refused} and could run code when loaded: get it from its makers, or save"
            " its tensors alone where you trust it"
        ) from refused
    except Damaged as damaged:
        raise UserError(f"{path} is damaged ({damaged}): copy or download it again") from damaged


def tensors(tree: Any) -> dict[str, StoredTensor]:
    """Every tensor in nested dicts, lists and tuples by its path: `model.language_model.layers.0.weight`.

    The contents of stand-ins and of Namespaces are left out. UserError if two paths are the same.
    """
    found: dict[str, StoredTensor] = {}
    nodes: list[tuple[str, Any, int]] = [("", tree, 0)]
    for path, value, depth in nodes:  # grows
        if isinstance(value, StoredTensor):
            if path in found:
                raise UserError(f"{value.file} holds the tensor {path} twice: copy or download it again")
            found[path] = value
        elif isinstance(value, dict | list | tuple):
            if len(nodes) + len(value) > _NODES or depth > _DEPTH:
                raise UserError("a file of torch.save holds itself, or millions of values: it is no checkpoint")
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            nodes.extend((f"{path}.{key}" if path else f"{key}", child, depth + 1) for key, child in pairs)
    return found


def verify_crc(
    path: Path, advance: Callable[[int], None] | None = None, start: int = 0, size: int | None = None
) -> bool:
    """Whether the file has checksums; UserError if one differs from its record's bytes, all of which are read.

    `advance` hears of the bytes read, from threads; `size` bytes from `start` on are the file.
    """
    with path.open("rb") as file:
        records = read_records(file, path, start, size)
        if not any(record.crc for record in records.values()):  # torch.serialization.set_crc32_options(False)
            return False
        with ThreadPoolExecutor(_THREADS) as threads:
            found = threads.map(lambda record: crc_of(file, record, advance), records.values())
            for record, crc in zip(records.values(), found, strict=True):
                if crc != record.crc:
                    threads.shutdown(cancel_futures=True)
                    raise UserError(
                        f"{path} is damaged (the checksum of {record.name} differs): copy or download it again"
                    )
    return True


def _check_kind(file: IO[bytes], path: Path, start: int) -> None:
    file.seek(start)
    head = file.read(4)
    if head[:1] == b"\x80":
        raise UserError(
            f"{path} is of torch 1.5 or earlier, expected 1.6 or later: save it again with"
            f" torch.save(torch.load({path.name!r}, weights_only=True), {path.name!r})"
        )
    if head != b"PK\3\4":
        raise UserError(f"{path} is truncated or no file of torch.save: copy or download it again")


def _base(records: dict[str, Record], path: Path) -> str:
    """The folder inside the archive that all records share."""
    bases = {name.partition("/")[0] for name in records}
    if len(bases) != 1 or f"{(base := bases.pop())}/data.pkl" not in records:
        raise UserError(f"{path} is a zip but no file of torch.save: data.pkl is missing, or not the only one")
    if f"{base}/constants.pkl" in records:
        raise UserError(f"{path} is a TorchScript program, expected tensors: save its state_dict with torch.save")
    if records[f"{base}/data.pkl"].size > _PICKLE_BYTES:
        raise UserError(f"{path} describes its tensors in more than {_PICKLE_BYTES >> 20} MB: it is no checkpoint")
    return base


def _check_byte_order(file: IO[bytes], record: Record | None, path: Path) -> None:
    if record and (found := _bytes(file, record)) != b"little":
        raise UserError(
            f"{path} was written with byte order {found[:16]!r}, expected little: save it again on x86 or ARM"
        )


def _pickle(file: IO[bytes], path: Path, records: dict[str, Record], name: str) -> bytes:
    """The pickled object: a bit flipped in it can swap two tensors, so its checksum is always looked at."""
    data = _bytes(file, records[name])
    if any(record.crc for record in records.values()) and zlib.crc32(data) != records[name].crc:
        raise UserError(f"{path} is damaged (the checksum of {name} differs): copy or download it again")
    return data


def _bytes(file: IO[bytes], record: Record) -> bytes:
    file.seek(record.offset)
    return file.read(record.size)


def is_sizes(values: Any) -> bool:
    """Whether they are whole numbers that fit a file's sizes."""
    return (
        isinstance(values, tuple)
        and len(values) <= _DIMENSIONS
        and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
    )


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any = False, hooks: Any = None,
    metadata: Any = None, *, dtype: torch.dtype | None = None,
) -> StoredTensor:  # fmt: skip
    """A view of a storage, which it must fit; `dtype` is another than the storage's own."""
    del requires_grad, hooks
    if not isinstance(storage, _Storage) or metadata:
        raise Damaged("a tensor that is conjugated, negated or not made of a storage")
    if not is_sizes((offset,)) or not is_sizes(shape) or not is_sizes(strides) or len(shape) != len(strides):
        raise Damaged(f"a tensor in {storage.record.name} whose shape, strides or offset cannot be")
    dtype = dtype or storage.dtype
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.numel * storage.dtype.itemsize:
        raise Damaged(f"a tensor of shape {list(shape)} goes beyond its storage {storage.record.name}")
    return StoredTensor(storage.file, storage.record.offset + offset * dtype.itemsize, dtype, tuple(shape), strides)


def _tensor_of_dtype(*args: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: the dtypes that have no storage class."""
    if len(args) < 7 or not isinstance(args[6], torch.dtype):
        raise Damaged("a tensor without a dtype")
    return _tensor(*args[:6], metadata=args[7] if len(args) > 7 else None, dtype=args[6])


def _parameter(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, StoredTensor | StandIn):
        raise Damaged("a parameter without a tensor")
    return tensor


def _with_attributes(make: Any, kind: Any, args: Any, *_: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with Python attributes, which are left out."""
    if isinstance(make, StandIn) or isinstance(kind, StandIn):
        return StandIn("torch._tensor._rebuild_from_type_v2", (make, kind, args))
    if make not in _MAKERS or kind not in _CLASSES or not isinstance(args, tuple):
        raise Refused(f"torch._tensor._rebuild_from_type_v2 of {getattr(make, 'name', type(make).__name__)}")
    return make.make(*args)


def _size(values: Any = ()) -> tuple[int, ...]:
    if not is_sizes(sizes := tuple(values)):
        raise Damaged("a torch.Size that cannot be")
    return sizes


def _refused(name: str) -> Maker:
    def refuse(*_: Any) -> None:
        raise Refused(f"a call of {name}")

    return Maker(name, refuse)


_MAKERS = [
    Maker("torch._utils._rebuild_tensor", _tensor),
    Maker("torch._utils._rebuild_tensor_v2", _tensor),
    Maker("torch._utils._rebuild_tensor_v3", _tensor_of_dtype),
    Maker("torch._utils._rebuild_parameter", _parameter),
    Maker("torch._utils._rebuild_parameter_with_state", _parameter),
]
_CLASSES = [_refused("torch.Tensor"), _refused("torch.nn.parameter.Parameter"), _refused("torch.nn.parameter.Buffer")]
NAMES: dict[tuple[str, str], Any] = {
    **{(maker.name.rpartition(".")[0], maker.name.rpartition(".")[2]): maker for maker in (*_MAKERS, *_CLASSES)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{(module, name): dtype for name, dtype in STORAGES.items() for module in ("torch", "torch.cuda")},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch.storage", "_UntypedStorage"): torch.uint8,
    ("torch", "Size"): Maker("torch.Size", _size),
    ("torch", "device"): Maker("torch.device", lambda kind, *index: f"{kind:.9}" + "".join(f":{i:d}" for i in index)),
    ("torch.serialization", "_get_layout"): Maker("torch.serialization._get_layout", lambda name: f"{name:.99}"),
    ("torch._tensor", "_rebuild_from_type_v2"): Maker("torch._tensor._rebuild_from_type_v2", _with_attributes),
}  # fmt: skip
