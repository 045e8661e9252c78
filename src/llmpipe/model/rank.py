"""What a pipeline rank holds of a model: the decoders of its stages."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmpipe.families import ONE_STAGE, Shape
from llmpipe.layout import Stages
from llmpipe.model.decoder import Decoder
from llmpipe.parallel.groups import TensorParallel


class RankModel(nn.ModuleList):
    """A decoder for each virtual stage of a pipeline rank, in the order of the flow; one where vp is 1.

    Each is a module of its own to FSDP2 and to torch's schedules. Parameters go by the family table's names, which
    number layers globally: no two stages of a rank have the same.
    """

    def __init__(
        self,
        shape: Shape,
        tp: TensorParallel | None = None,
        stages: Stages = ONE_STAGE,
        rank: int = 0,
        **options: Any,
    ):
        super().__init__(Decoder(shape, tp, stages, stage, **options) for stage in stages.of_rank(rank))
        self.shape = shape

    @property
    def hits(self) -> list[torch.Tensor]:
        """(N,) bool of each micro-batch, of the last stage: which labels were found the likeliest."""
        return [*self][-1].hits

    def __iter__(self) -> Iterator[Decoder]:
        return super().__iter__()  # type: ignore[return-value]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of all its stages, without the stage's number before their names."""
        for stage in self:
            yield from stage.named_parameters(*args, **kwargs)
