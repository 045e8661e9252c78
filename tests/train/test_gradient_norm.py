"""The gradient's norm, for clipping."""

import pytest
import torch

from llmpipe.train.optimizer import sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(0,), (7,), (2049, 2048)], ids=str)
def test_squares_are_summed_without_loss(size, dtype) -> None:
    """Against fp64. torch.linalg.vector_norm is off by 1e-4 here, a sum of bf16 squares by up to 2e-3."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sum_of_squares(x)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), x.double().square().sum(), rtol=1e-6, atol=0)
