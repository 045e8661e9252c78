"""Each rank reads exactly its own bytes of a checkpoint or of rank files; no full tensor, no communication."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.source import TensorSource
from llmpipe.families import FAMILIES, Shape
from llmpipe.layout import Stages, chunk
from llmpipe.model.rank import RankModel
from llmpipe.parallel.groups import TensorParallel


def local_slices(shape: Shape, key: str, tp: int, tp_rank: int, dp: int = 1, dp_rank: int = 0) -> tuple[slice, ...]:
    """The part of a full tensor that a rank holds: tp's slice, of which FSDP2 gives each dp rank a chunk of dim 0."""
    rows, *rest = FAMILIES[shape.family].row(key, shape).slices(shape, tp, tp_rank)
    part = chunk(rows.stop - rows.start, dp, dp_rank)
    return slice(rows.start + part.start, rows.start + part.stop), *rest


@torch.no_grad()
def fill(
    parameters: Mapping[str, nn.Parameter], source: TensorSource, tp: TensorParallel, dp: int = 1, dp_rank: int = 0
) -> None:
    """Copy a rank's slices into its parameters, by our names, in the parameters' dtype."""
    for key, parameter in parameters.items():
        if parameter.numel():
            parameter.copy_(source.read(key, local_slices(source.shape, key, tp.size, tp.rank, dp, dp_rank)))


def load_decoder(
    path: Path, tp: TensorParallel, stages: Stages, rank: int, dtype: torch.dtype, device: torch.device
) -> RankModel:
    """A pipeline rank's part of the model for inference, this tp rank's slice of it in `dtype`."""
    source = open_source(path)
    source.shape.check_split(tp.size, stages)
    with torch.device("meta"):
        model = RankModel(source.shape, tp, stages, rank)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    fill(dict(model.named_parameters()), source, tp)
    return model
