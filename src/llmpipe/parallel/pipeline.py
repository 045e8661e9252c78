"""Forward and backward of a step's micro-batches: torch's 1F1B schedule over the stages, a plain loop with one stage.

M micro-batches of N tokens each (B rows of T), H hidden, tp ranks.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from llmpipe.parallel.groups import Groups


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


def make_schedule(
    model: nn.Module, groups: Groups, num_micro_batches: int, num_tokens: int, hidden: int, dtype: torch.dtype
) -> Schedule1F1B | None:
    """The 1F1B schedule of this rank's stage; None with one stage. `dtype` is what passes between stages."""
    pp, stage = groups.layout.pp, groups.at.pp
    if pp == 1:
        return None

    def between(requires_grad: bool) -> torch.Tensor:  # (N/tp, H)
        rows = num_tokens // groups.layout.tp
        return torch.empty(rows, hidden, dtype=dtype, device=groups.device, requires_grad=requires_grad)

    tokens = torch.empty(num_tokens, dtype=torch.int64, device=groups.device)
    loss = torch.empty(1, device=groups.device, requires_grad=True)
    made = PipelineStage(
        model,
        stage,
        pp,
        groups.device,
        group=groups.pp,
        input_args=(tokens if groups.is_first_stage else between(True),),
        output_args=(loss if groups.is_last_stage else between(True),),
    )
    return Schedule1F1B(made, num_micro_batches, loss_fn=_its_own, scale_grads=False)


def _its_own(loss: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The last stage's output of one micro-batch, (1,), as the schedule wants it; there is no target."""
    return loss.sum()


def forward_backward(
    model: nn.Module,
    schedule: Schedule1F1B | None,
    groups: Groups,
    batch: Batch,
    total_weight: torch.Tensor,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Accumulate the gradient of Σ w·ℓ / total_weight over the micro-batches (design decision 10).

    Each weight is divided, not the sum: in fp16 total_weight holds the loss scale, which the loss's own gradient needs
    too. seeds: (M,) int64, each micro-batch's for dropout. Returns this rank's share of the loss, (): 0 but on the last
    stage.
    """
    if schedule is None:
        return _accumulate(model, batch, total_weight, seeds)
    num_micro_batches = batch.tokens.shape[0]
    inputs = (batch.tokens.flatten(),) if groups.is_first_stage else ()  # (M·N,)
    losses: list[torch.Tensor] = []
    last = {"target": torch.zeros(num_micro_batches), "losses": losses} if groups.is_last_stage else {}
    dropped: dict[str, Any] = {} if seeds is None else {"seed": seeds}  # (M,)
    schedule.step(
        *inputs,
        **last,
        return_outputs=False,
        cu_seqlens=batch.cu_seqlens,  # (M, documents + 1)
        labels=batch.labels.flatten(),  # (M·N,)
        weights=(batch.weights / total_weight).flatten(),  # (M·N,)
        **dropped,
    )
    return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=groups.device)


def _accumulate(model: nn.Module, batch: Batch, total_weight: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
    """One stage: gradients are reduced over dp once, in the last micro-batch's backward."""
    num_micro_batches = batch.tokens.shape[0]
    loss = torch.zeros((), device=batch.tokens.device)
    for i, (tokens, cu_seqlens, labels, weights) in enumerate(batch.micro_batches()):
        if isinstance(model, FSDPModule):
            is_last = i == num_micro_batches - 1
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)
            model.set_is_last_backward(is_last)
        share = model(tokens, cu_seqlens, labels, weights / total_weight, seed=None if seeds is None else seeds[i])[0]
        share.backward()
        loss += share.detach()
    return loss
