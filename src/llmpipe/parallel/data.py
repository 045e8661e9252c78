"""Data parallelism: what each of the dp x cp ranks of a parameter holds of it, and how their gradients are summed.

Where ranks share a parameter out: FSDP2, Zhao et al. 2023, arXiv:2304.11277; with its weights whole for a step that is
the second stage of ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054. Where each has all of it: an all-reduce.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llmpipe.layout import Layout
from llmpipe.parallel.compat import reduced_in
from llmpipe.parallel.groups import Groups

_BUCKET = 1 << 25  # elements that are all-reduced at once


def distribute(model: nn.Module, groups: Groups, compute: torch.dtype, gradients: torch.dtype) -> None:
    """Leave each rank its part of `model`, with memory of its own if that is on meta; it computes in `compute`.

    Gradients are summed, not averaged, over micro-batches and ranks in `gradients`: the loss is already divided by the
    global batch's weight. A part keeps its type; a whole parameter is held in `compute` itself.
    """
    if groups.layout.shards == 1:
        _materialize(model.to(compute), groups)
        for parameter in model.parameters():
            parameter.grad_dtype = gradients
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=gradients, cast_forward_inputs=False)
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    for module in (*layers.values(), model):
        # The last one's weights are needed again at once, by its own backward.
        reshard = groups.layout.gathers_again and module is not model
        fully_shard(module, mesh=groups.sharding, mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    _materialize(model, groups)


def _materialize(model: nn.Module, groups: Groups) -> None:
    if next(model.parameters()).is_meta:
        model.to_empty(device=groups.device)


def before_micro_batch(model: nn.Module, layout: Layout, is_last: bool) -> None:
    """Before each micro-batch of a single stage: what is whole during a step stays so until its last backward.

    Copies of what ranks share out are summed once a step, in the last backward.
    """
    if isinstance(model, FSDPModule):
        in_parts = sums_parts(layout, kept=next(model.parameters()).dtype, summed=reduced_in(model))
        model.set_requires_gradient_sync(is_last or in_parts)
        model.set_requires_all_reduce(is_last)
        model.set_reshard_after_backward(is_last or layout.gathers_again)
        model.set_is_last_backward(is_last or in_parts)


def sums_parts(layout: Layout, kept: torch.dtype, summed: torch.dtype) -> bool:
    """Whether each micro-batch's gradient is shared out at once, and never whole but for a layer's.

    FSDP2 adds those parts up in the type that weights are kept in, unless copies are still to be summed: where that
    would lose digits, whole ones are added up.
    """
    return layout.gathers_again and (layout.copies > 1 or kept.itemsize >= summed.itemsize)


def take_gradients(model: nn.Module, groups: Groups) -> Iterator[tuple[str, torch.Tensor]]:
    """The gradient of each parameter over all ranks, this rank's part of it; the model lets go of it."""
    if groups.layout.shards == 1 and groups.layout.num_data > 1:
        _sum(groups.data, (local(parameter.grad) for parameter in model.parameters()))
    for key, parameter in model.named_parameters():
        gradient, parameter.grad = local(parameter.grad), None
        yield key, gradient


def _sum(group: dist.ProcessGroup, tensors: Iterable[torch.Tensor]) -> None:
    """All-reduce tensors of one type, in place, many at once."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket]) if len(bucket) > 1 else bucket[0].flatten()
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in turn, as many as make up `_BUCKET` elements, or one that is larger."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def drop_gathered(model: nn.Module) -> None:
    """Let go of whole weights that a forward pass without backward left: the ranks' parts have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of a parameter or gradient."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
