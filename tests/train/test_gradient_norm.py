"""The gradient's norm, for clipping."""

from dataclasses import replace

import pytest
import torch
from jobs import RECIPE
from torch.utils._python_dispatch import TorchDispatchMode

from llmpipe.families import named_size
from llmpipe.layout import Layout
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.processes import run_ranks
from llmpipe.parallel.tensor import Weight
from llmpipe.train.optimizer import Optimizer, sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(0,), (7,), (2049, 2048)], ids=str)
def test_squares_are_summed_without_loss(size, dtype) -> None:
    """Against fp64. torch.linalg.vector_norm is off by 1e-4 here, a sum of bf16 squares by up to 2e-3."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sum_of_squares(x)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), x.double().square().sum(), rtol=1e-6, atol=0)


class Written(TorchDispatchMode):
    """Counts the operations that change a tensor of the gradient's size in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.is_mutable and args[0].numel() == 64
        return func(*args, **(kwargs or {}))


def clipped(clip: float) -> tuple[float, float, int]:
    """The norm before and after, of a gradient of eights, and how often the gradient was written."""
    groups = make_groups(Layout(device="cpu").resolved(), torch.device("cpu"))
    model = torch.nn.ModuleDict({"norm": Weight(64)})
    optimizer = Optimizer(model, named_size("llama2_7b"), replace(RECIPE, clip=clip), groups)
    next(model.parameters()).grad = torch.full((64,), 8.0)
    with Written() as written:
        norm = optimizer.reduce_and_clip()
    (parameter,) = optimizer.parameters.values()
    assert parameter.grad is not None
    return norm, parameter.grad.norm().item(), written.count


def test_a_gradient_is_multiplied_only_where_it_is_too_long() -> None:
    ((norm, after, written),) = run_ranks(clipped, 1, 16.0)
    assert norm == 64 and after == pytest.approx(16) and written == 1
    assert run_ranks(clipped, 1, 65.0) == [(64, 64, 0)]
