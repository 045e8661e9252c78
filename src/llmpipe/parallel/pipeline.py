"""Forward and backward of a step's micro-batches: one of torch's schedules over the stages, a plain loop with one.

M micro-batches of N tokens each (B rows of T), H hidden, tp ranks.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from llmpipe.layout import Layout
from llmpipe.parallel.data import before_micro_batch
from llmpipe.parallel.groups import Groups
from llmpipe.parallel.schedules import ONE_STAGE_EACH, schedule_name

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
"""torch's, by the names of schedules.py."""


class Batch(Protocol):
    """A rank's share of a global batch, on the rank's device."""

    @property
    def tokens(self) -> torch.Tensor: ...  # (M, B, T) int64
    @property
    def labels(self) -> torch.Tensor: ...  # (M, B, T) int64
    @property
    def weights(self) -> torch.Tensor: ...  # (M, B, T) fp32
    @property
    def cu_seqlens(self) -> torch.Tensor: ...  # (M, documents + 1) int32, padded at the end with N
    def micro_batches(self) -> Iterator[tuple[torch.Tensor, ...]]: ...  # tokens, cu_seqlens, labels, weights of each


class Pipeline:
    """A rank's stages (one module each), and how a step's micro-batches go through them.

    Stages hand on tensors of one size: (num_tokens / tp, hidden), in `dtype`.
    """

    def __init__(self, stages: nn.ModuleList, groups: Groups, num_tokens: int, hidden: int, dtype: torch.dtype):
        self.stages, self.groups = stages, groups
        self.num_tokens, self.hidden, self.dtype = num_tokens, hidden, dtype
        self.schedule: tuple[int, Schedule] | None = None

    def forward_backward(
        self, batch: Batch, total_weight: torch.Tensor, seeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Accumulate the gradient of Σ w·ℓ / total_weight over the micro-batches (design decision 10).

        Each weight is divided, not the sum: in fp16 total_weight holds the loss scale, which the loss's own gradient
        needs too. seeds: (M,) int64, each micro-batch's for dropout. Returns this rank's share of the loss, (): 0 but
        where the last stage is.
        """
        if self.groups.layout.pp == 1:
            return _accumulate(self.stages[0], self.groups.layout, batch, total_weight, seeds)
        num_micro_batches = batch.tokens.shape[0]
        inputs = (batch.tokens.flatten(),) if self.groups.is_first_stage else ()  # (M·N,)
        losses: list[torch.Tensor] = []
        last = {"target": torch.zeros(num_micro_batches), "losses": losses} if self.groups.is_last_stage else {}
        dropped: dict[str, Any] = {} if seeds is None else {"seed": seeds}  # (M,)
        self._schedule(num_micro_batches).step(
            *inputs,
            **last,
            return_outputs=False,
            cu_seqlens=batch.cu_seqlens,  # (M, documents + 1)
            labels=batch.labels.flatten(),  # (M·N,)
            weights=(batch.weights / total_weight).flatten(),  # (M·N,)
            **dropped,
        )
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.groups.device)

    def _schedule(self, num_micro_batches: int) -> Schedule:
        """The schedule of so many micro-batches; the last one is kept, for it holds the buffers of what is received."""
        if self.schedule is None or self.schedule[0] != num_micro_batches:
            self.schedule = num_micro_batches, self._make_schedule(num_micro_batches)
        return self.schedule[1]

    def _make_schedule(self, num_micro_batches: int) -> Schedule:
        layout, numbers = self.groups.layout, self.groups.layout.stages.of_rank(self.groups.at.pp)
        made = [self._stage(module, number) for module, number in zip(self.stages, numbers, strict=True)]
        name = schedule_name(layout)
        stages = made[0] if name in ONE_STAGE_EACH else made
        return SCHEDULES[name](stages, num_micro_batches, loss_fn=_its_own, scale_grads=False)

    def _stage(self, module: nn.Module, number: int) -> PipelineStage:
        """torch's wrapper of a stage, told the shapes that come and go, so that it does not run one to find out."""
        last = self.groups.layout.stages.count - 1
        tokens = torch.empty(self.num_tokens, dtype=torch.int64, device=self.groups.device)
        loss = torch.empty(1, device=self.groups.device, requires_grad=True)
        return PipelineStage(
            module,
            number,
            last + 1,
            self.groups.device,
            group=self.groups.pp,
            input_args=(tokens if number == 0 else self._between(),),
            output_args=(loss if number == last else self._between(),),
        )

    def _between(self) -> torch.Tensor:
        """(N/tp, H), as one stage gives it to the next."""
        rows, device = self.num_tokens // self.groups.layout.tp, self.groups.device
        return torch.empty(rows, self.hidden, dtype=self.dtype, device=device, requires_grad=True)


def _its_own(loss: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The last stage's output of one micro-batch, (1,), as the schedule wants it; there is no target."""
    return loss.sum()


def _accumulate(
    model: nn.Module, layout: Layout, batch: Batch, total_weight: torch.Tensor, seeds: torch.Tensor | None
) -> torch.Tensor:
    """One stage: micro-batch after micro-batch."""
    num_micro_batches = batch.tokens.shape[0]
    loss = torch.zeros((), device=batch.tokens.device)
    for i, (tokens, cu_seqlens, labels, weights) in enumerate(batch.micro_batches()):
        before_micro_batch(model, layout, is_last=i == num_micro_batches - 1)
        share = model(tokens, cu_seqlens, labels, weights / total_weight, seed=None if seeds is None else seeds[i])[0]
        share.backward()
        loss += share.detach()
    return loss
