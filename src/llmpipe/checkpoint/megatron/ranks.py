"""What the files of a Megatron directory hold, opened without reading a tensor: each stage's tensors, and the args."""

import logging
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.containers.distcp import Sharded, locate, read_distcp
from llmpipe.checkpoint.containers.inert import StandIn
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import read_torch_file, tensors
from llmpipe.checkpoint.megatron.directory import is_torch_dist, rank_files
from llmpipe.checkpoint.megatron.layout import Place
from llmpipe.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = re.compile(r"model(\d*)")
_STACKED = "decoder.layers."
# What training saves beside the weights, under these names or below them.
_STATES = re.compile(r"(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state_machine|iteration)\b")
_BESIDE = ("optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine")


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor of a stage: rectangles of it (rows, columns; a vector is one row), and where each lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[slice, slice, StoredTensor], ...]


@dataclass(slots=True)
class Opened:
    """A checkpoint's tensors by the names below `model`, for each rank's stages."""

    folder: Path
    tp: int
    pp: int
    vp: int
    places: dict[Place, dict[str, Found]]
    args: Namespace | None


def open_folder(folder: Path) -> Opened:
    """Open rank files or a torch_dist folder; optimizer and random states are left alone, which the log says."""
    opened = _open_torch_dist(folder) if is_torch_dist(folder) else _open_ranks(folder)
    if not any(opened.places.values()):
        raise UserError(f"{folder} holds no tensors of a model: copy or download it again")
    return opened


def _open_ranks(folder: Path) -> Opened:
    files = rank_files(folder)
    tp, pp = (max(rank[which] for rank in files) + 1 for which in (0, 1))
    places: dict[Place, dict[str, Found]] = {}
    args, beside = None, set()
    numbers: dict[tuple[int, int], Any] = {}
    for (tp_rank, pp_rank), file in files.items():
        table = _table(file)
        args = args or _namespace(table.get("args"))
        _check_layout(file, _namespace(table.get("args")), tp, pp)
        numbers[tp_rank, pp_rank] = getattr(_namespace(table.get("args")), "rank", None)
        beside |= {name for name in _BESIDE if table.get(name) is not None}
        chunks = sorted((int(m[1] or 0), name) for name in table if (m := _CHUNK.fullmatch(str(name))))
        for number, (chunk, name) in enumerate(chunks):
            if chunk != number or not isinstance(table[name], dict):
                raise UserError(f"{file}: {name} is no table of tensors, or model{number} is missing")
            places[Place(tp_rank, number * pp + pp_rank)] = _found(tensors(table[name]))
    stages = {place.stage for place in places}
    if len(places) != tp * len(stages) or len(stages) % pp:
        raise UserError(f"{folder}: the ranks hold unequal numbers of virtual stages: copy or download it again")
    _check_numbers(folder, numbers, tp)
    _say_left_alone(folder, beside)
    return Opened(folder, tp, pp, len(stages) // pp, places, args)


def _table(file: Path) -> dict[str, Any]:
    """A rank's file; UserError if it is none, or has another order of rows in q, k and v."""
    table = read_torch_file(file, stand_ins=True)
    if not isinstance(table, dict) or not any(_CHUNK.fullmatch(str(name)) for name in table):
        raise UserError(f"{file} holds no `model`: it is no file of Megatron's training")
    version = table.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise UserError(
            f"{file} has checkpoint_version {version!r}, whose rows of q, k and v stand in another order, expected 2 or"
            " later: load and save it once with the Megatron that wrote it"
        )
    return table


def _namespace(args: Any) -> Namespace | None:
    """The args as a Namespace, whatever class they were."""
    if isinstance(args, StandIn):
        return Namespace(**{name: value for name, value in args.state.items() if isinstance(name, str) and name})
    return args if isinstance(args, Namespace) else None


def _check_layout(file: Path, args: Namespace | None, tp: int, pp: int) -> None:
    said = [getattr(args, f"{kind}_model_parallel_size", None) for kind in ("tensor", "pipeline")]
    if any(size not in (None, found) for size, found in zip(said, (tp, pp), strict=True)):
        raise UserError(
            f"{file} says that it is of tp {said[0]} x pp {said[1]} ranks, but {tp} x {pp} are beside it: files of two"
            " checkpoints, or not all of one: copy or download all of it"
        )


def _check_numbers(folder: Path, numbers: dict[tuple[int, int], Any], tp: int) -> None:
    """Training notes which process wrote a file (converters: 0 in all): tp changes fastest, pp slowest."""
    if len(set(numbers.values())) < len(numbers) or any(type(number) is not int for number in numbers.values()):
        return
    in_order = sorted(numbers, key=lambda rank: numbers[rank])
    for (tp_rank, pp_rank), by_pp in zip(in_order, sorted(pp_rank for _, pp_rank in numbers), strict=True):
        number = numbers[tp_rank, pp_rank]
        if (number % tp, by_pp) != (tp_rank, pp_rank):
            raise UserError(
                f"{folder}: the file of tp {tp_rank}, pp {pp_rank} was written by process {number}, which was tp"
                f" {number % tp}, pp {by_pp}: files are swapped; copy or download all of the checkpoint"
            )


def _found(stored: dict[str, StoredTensor]) -> dict[str, Found]:
    """Tensors that are in one piece."""
    return {
        name: Found(tensor.file, tensor.dtype, tensor.shape, ((*_everything(tensor.shape), tensor),))
        for name, tensor in stored.items()
    }


def _everything(shape: tuple[int, ...]) -> tuple[slice, slice]:
    rows, cols = shape if len(shape) == 2 else (1, shape[0] if shape else 0)
    return slice(0, rows), slice(0, cols)


def _open_torch_dist(folder: Path) -> Opened:
    """One stage of one rank, its tensors in chunks; a tensor of all layers is one for each."""
    container = read_distcp(folder)
    common = read_torch_file(folder / "common.pt", stand_ins=True) if (folder / "common.pt").is_file() else {}
    found: dict[str, Found] = {}
    states = {m[2] for name in (*container.tensors, *container.objects) if (m := _STATES.match(name))}
    for name, sharded in container.tensors.items():
        if not _STATES.match(name):
            found |= _unstacked(name, sharded, folder)
    _say_left_alone(folder, states | {name for name in _BESIDE if isinstance(common, dict) and common.get(name)})
    args = _namespace(common.get("args")) if isinstance(common, dict) else None
    return Opened(folder, 1, 1, 1, {Place(0, 0): found}, args)


def _unstacked(name: str, sharded: Sharded, folder: Path) -> dict[str, Found]:
    """A tensor by its name; one of all layers, whose first dimension they are, by theirs."""
    rest = name.removeprefix(_STACKED)
    if rest == name or rest.partition(".")[0].isdigit():
        pieces = [_rectangle(locate(sharded, chunk), chunk.offsets) for chunk in sharded.chunks]
        return {name: Found(folder, sharded.dtype, sharded.shape, tuple(pieces))}
    layers: list[list[tuple[slice, slice, StoredTensor]]] = [[] for _ in range(sharded.shape[0])]
    for chunk in sharded.chunks:
        tensor = locate(sharded, chunk)
        for number in range(tensor.shape[0]):
            start = tensor.offset + number * tensor.strides[0] * tensor.dtype.itemsize
            layer = StoredTensor(tensor.file, start, tensor.dtype, tensor.shape[1:], tensor.strides[1:])
            layers[chunk.offsets[0] + number].append(_rectangle(layer, chunk.offsets[1:]))
    return {
        f"{_STACKED}{number}.{rest}": Found(folder, sharded.dtype, sharded.shape[1:], tuple(pieces))
        for number, pieces in enumerate(layers)
    }


def _rectangle(tensor: StoredTensor, offsets: tuple[int, ...]) -> tuple[slice, slice, StoredTensor]:
    """The rows and columns that a chunk from `offsets` on is of its tensor."""
    starts, sizes = (0, *offsets)[-2:], (1, *tensor.shape)[-2:]
    rows, cols = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return rows, cols, tensor


def _say_left_alone(folder: Path, states: set[str]) -> None:
    if states:
        log.info("%s: left alone, weights only are read: %s", folder, ", ".join(sorted(states)))
