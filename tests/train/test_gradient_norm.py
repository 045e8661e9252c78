"""The gradient's norm, for clipping."""

from dataclasses import replace

import pytest
import torch
from jobs import RECIPE

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


GRADIENTS = [8.0, 0.5, 3.0]
"""Of all 64 elements of the parameter, step by step: norms of 64, 4 and 24."""


def stepped(clip: float, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The norms told, and the parameter after the steps."""
    groups = make_groups(Layout(device="cpu").resolved(), torch.device("cpu"))
    model = torch.nn.ModuleDict({"norm": Weight(64)}).to(dtype)
    (parameter,) = model.parameters()
    recipe = replace(RECIPE, clip=clip, parameters={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    torch.nn.init.ones_(parameter)
    optimizer, norms = Optimizer(model, named_size("llama2_7b"), recipe, groups), []
    for value in GRADIENTS:
        parameter.grad = torch.full((64,), value, dtype=dtype)
        norms.append(optimizer.reduce_and_clip())
        optimizer.step(1e-2, 0.1)
    return norms, parameter.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [16.0, 2.0, 65.0])
def test_steps_are_clipped_as_torch_clips(clip, dtype) -> None:
    """AdamW forgets a scale that all steps share: here some are clipped and some are not."""
    parameter = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    adamw = torch.optim.AdamW([parameter], lr=1e-2, betas=tuple(RECIPE.betas), eps=RECIPE.eps, weight_decay=0.0)
    for value in GRADIENTS:
        parameter.grad = torch.full((64,), value, dtype=dtype)
        torch.nn.utils.clip_grad_norm_([parameter], clip)
        adamw.step()
    ((norms, found),) = run_ranks(stepped, 1, clip, dtype)
    assert norms == [64, 4, 24]
    assert found == pytest.approx(parameter.tolist(), rel=1e-6 if dtype == torch.float32 else 4e-3)
