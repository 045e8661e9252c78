"""Data parallelism: FSDP2 over the ranks that hold the same parameters, dp × cp of them.

Zhao et al. 2023, arXiv:2304.11277.
"""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llmpipe.parallel.groups import Groups


def shard(model: nn.Module, groups: Groups, compute: torch.dtype, gradients: torch.dtype) -> None:
    """Each rank keeps a chunk of every parameter of `model` and of its `layers`, as it is, and computes in `compute`.

    Gradients are summed, not averaged, over micro-batches and ranks in `gradients`: the loss is already divided by the
    global batch's weight.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=gradients, cast_forward_inputs=False)
    # With several stages a layer's weights are needed again at once, by the next micro-batch.
    reshard = groups.layout.pp == 1
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    for module in (*layers.values(), model):
        fully_shard(module, mesh=groups.mesh["data"], mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
