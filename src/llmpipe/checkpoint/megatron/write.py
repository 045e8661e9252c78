"""Megatron directories, written: rank files of TP x PP in any dialect, and latest_checkpointed_iteration.txt."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.megatron.dialect import Dialect, Written
from llmpipe.checkpoint.megatron.directory import FILES, TRACKER
from llmpipe.checkpoint.megatron.layout import Grid, Place, check_split, rank_layout
from llmpipe.checkpoint.mover import Filled, Mover
from llmpipe.checkpoint.source import TensorSource
from llmpipe.checkpoint.torch_write import tensors_to_fill, write_torch_files
from llmpipe.errors import UserError
from llmpipe.families import Shape
from llmpipe.files import sha256, write_text
from llmpipe.layout import Stages
from llmpipe.progress import progress

log = logging.getLogger(__name__)

VOCAB_MULTIPLE = 128
"""Megatron's default make_vocab_size_divisible_by."""


def targets(
    shape: Shape,
    dialect: Dialect,
    dtype: torch.dtype,
    tp: int,
    stages: Stages,
    vocab_multiple: int = VOCAB_MULTIPLE,
) -> dict[str, Any]:
    """Each file's tree, with a Filled for each tensor, by its path below the root; UserError if it cannot be."""
    if dialect.by_name_only:
        raise UserError(f"--dialect {dialect.name} is for reading: {dialect.system} is written in another")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"Megatron's files hold fp32, fp16 or bf16, not {dtype}: choose one with --dtype")
    step = vocab_multiple * tp
    padded = -(-shape.vocab // step) * step
    grid = Grid(tp, stages, padded, dialect.interleaved)
    check_split(dialect, shape, grid)
    args = dialect.write_args(shape, Written(tp, stages, dtype, padded, vocab_multiple))
    return {
        _file(dialect, tp_rank, pp_rank, stages.pp): {
            "args": _of_rank(args, pp_rank * tp + tp_rank),
            **dialect.outer,
            **_models(shape, dialect, grid, dtype, tp_rank, pp_rank),
        }
        for pp_rank in range(stages.pp)
        for tp_rank in range(tp)
    }


def write(
    mover: Mover,
    directory: Path,
    dialect: Dialect,
    tp: int,
    stages: Stages,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = VOCAB_MULTIPLE,
) -> dict[str, str | None]:
    """Fill a directory with a source's ranks; returns the files' SHA-256, None where the mover takes none.

    A file is in one type, as Megatron's models are: `dtype`, or else that of the source's embedding.
    """
    dtype = dtype or _common_dtype(mover.source)
    trees = targets(mover.source.shape, dialect, dtype, tp, stages, vocab_multiple)
    with progress("convert", bytes_of(trees), "B") as shown:
        hashes = write_torch_files(mover, directory, trees, shown)
    write_text(directory / TRACKER, "release" if dialect.folder == "release" else str(int(dialect.folder[5:])))
    return hashes | {TRACKER: sha256(directory / TRACKER)}


def _common_dtype(source: TensorSource) -> torch.dtype:
    """The embedding's type; the log says what is cast to it."""
    dtype = source.dtype("embedding.weight")
    other = [key for key in source.keys() if source.dtype(key) != dtype]  # noqa: SIM118
    if other:
        log.warning(
            "%s: Megatron's files are of one type: %d tensors are cast to the embedding's, %s, among them %s: --dtype"
            " chooses another",
            source.path, len(other), dtype, other[0],
        )  # fmt: skip
    return dtype


def bytes_of(trees: dict[str, Any]) -> int:
    """The bytes of all tensors."""
    return sum(filled.bytes for tree in trees.values() for filled in tensors_to_fill(tree).values())


def _of_rank(args: Namespace | None, rank: int) -> Namespace | None:
    """The args as this process would have saved them; where a dialect's own tools write a number, that stays."""
    return args if args is None or "rank" in args else Namespace(**vars(args), rank=rank)


def _file(dialect: Dialect, tp_rank: int, pp_rank: int, pp: int) -> str:
    stage = f"_{pp_rank:03d}" if pp > 1 else ""
    return f"{dialect.folder}/mp_rank_{tp_rank:02d}{stage}/{FILES[0]}"


def _models(
    shape: Shape, dialect: Dialect, grid: Grid, dtype: torch.dtype, tp_rank: int, pp_rank: int
) -> dict[str, Any]:
    """`model`, or model0, model1 ... of virtual stages."""
    stages = range(pp_rank, grid.stages.pp * grid.stages.vp, grid.stages.pp)
    return {
        f"model{number}" if grid.stages.vp > 1 else "model": _model(shape, dialect, grid, dtype, Place(tp_rank, stage))
        for number, stage in enumerate(stages)
    }


def _model(shape: Shape, dialect: Dialect, grid: Grid, dtype: torch.dtype, place: Place) -> dict[str, Any]:
    """A stage's tensors, and the states of its layers."""
    held: dict[str, Filled | None] = {
        item.stored.name: Filled(item.stored, dtype) for item in rank_layout(dialect, shape, grid, place)
    }
    count = len(grid.layers(shape.num_layers, place.stage))
    held |= {name.format(layer): None for layer in range(count) for name in dialect.empty}
    return _nested(held, dialect.tables)


def _nested(tensors: dict[str, Filled | None], tables: tuple[str, ...]) -> dict[str, Any]:
    """Tensors in tables within tables; a name's part below the innermost is one key, dots and all."""
    tree: dict[str, Any] = {}
    for name, filled in tensors.items():
        here, start = tree, 0
        for table in sorted((table for table in tables if name.startswith(f"{table}.")), key=len):
            here = here.setdefault(table[start:], {})
            start = len(table) + 1
        here[name[start:]] = filled
    return tree
