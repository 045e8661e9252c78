"""The parity matrix can fail: faults planted in what ranks send each other, one by one, show in a row of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import Cell, Matrix
from torch.distributed.fsdp import FSDPModule

from llmpipe.data.batches import batch
from llmpipe.layout import chunk
from llmpipe.model import loss
from llmpipe.parallel import collectives, context, data, tensor
from llmpipe.parallel.groups import Groups
from llmpipe.parallel.pipeline import Pipeline
from llmpipe.train import loop
from llmpipe.train.optimizer import Optimizer

Patch = Callable[[pytest.MonkeyPatch], None]


def own_rows(x: torch.Tensor, ranks: Any) -> torch.Tensor:
    """A reduce-scatter that forgets the other ranks' part of the sum."""
    return x[chunk(x.shape[0], ranks.size, ranks.rank)]


def nothing(*_: Any, **__: Any) -> None:
    """A collective that is left out."""


def wrong_sign(patch: pytest.MonkeyPatch) -> None:
    right = collectives._ScatterRows.backward
    patch.setattr(
        collectives._ScatterRows, "backward", staticmethod(lambda ctx, *grads: (-right(ctx, *grads)[0], None))
    )


def kv_heads_not_shared(patch: pytest.MonkeyPatch) -> None:
    right = Optimizer.copies
    patch.setattr(Optimizer, "copies", lambda self, key: 1 if "attention.k" in key else right(self, key))


def softmax_of_own_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loss, "dist", SimpleNamespace(all_reduce=nothing, ReduceOp=dist.ReduceOp))


def gradients_averaged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FSDPModule, "set_gradient_divide_factor", nothing)
    patch.setattr(FSDPModule, "set_force_sum_reduction_for_comms", nothing)


def labels_of_another_micro_batch(patch: pytest.MonkeyPatch) -> None:
    right = Pipeline.forward_backward
    patch.setattr(
        Pipeline,
        "forward_backward",
        lambda self, taken, *rest: right(self, replace(taken, labels=taken.labels.roll(1, 0)), *rest),
    )


def tokens_in_one_piece(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batch, "context_slices", lambda size, cp, rank: [chunk(size, cp, rank)])


def setting(holder: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(holder, name, value)


FAULTS: dict[str, tuple[str, Patch]] = {
    "a gradient comes back with the wrong sign": ("TP2", wrong_sign),
    "the input's gradient is not summed over tp": ("TP2", setting(tensor, "reduce_scatter_rows", own_rows)),
    "the norms' gradient is not summed over tp": ("TP2", setting(Optimizer, "_sum_over_tp", nothing)),
    "the gradient of a KV head that two ranks hold is not summed": ("TP4", kv_heads_not_shared),
    "the softmax is over a rank's own rows": ("TP2", softmax_of_own_rows),
    "gradients are not summed over data ranks": ("DP2, plain", setting(data, "_sum", nothing)),
    "gradients are averaged over data ranks": ("DP2", gradients_averaged),
    "gradients are not summed over nodes": (
        "DP4, hybrid", setting(Groups, "sharding", property(lambda self: self.mesh["shards"]))
    ),
    "the loss is divided by a rank's own weight": (
        "DP2", setting(loop, "global_weight", lambda weights, groups: weights.sum())
    ),
    "a tied embedding's gradients are not summed": ("PP2, tied", setting(Optimizer, "_sum_tied", nothing)),
    "the last stage has another micro-batch's labels": ("PP2", labels_of_another_micro_batch),
    "keys and values come in the ranks' order": ("CP2", setting(context, "_in_order", lambda x: x.flatten(0, 1))),
    "the keys' gradient is not summed over cp": ("CP2", setting(context, "reduce_scatter_rows", own_rows)),
    "a context rank has other tokens than it takes them for": ("CP2", tokens_in_one_piece),
}  # fmt: skip


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"), steps=3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault: str, matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plant = FAULTS[fault]
    cell = Cell(layout, "Llama", packing=True, micro_batches=4)
    matrix.alone(cell)  # before anything is wrong
    plant(monkeypatch)
    difference = matrix.difference(cell, tmp_path / "run")
    assert not difference.is_small, difference
