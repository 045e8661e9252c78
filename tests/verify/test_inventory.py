"""Fingerprints: equal for the same rows in any order, and for nothing else."""

import pytest
import torch

from llmpipe.verify.inventory import fingerprint, largest_rounding, lossy
from llmpipe.verify.memory import _group_limits

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=TYPES, ids=str)
def matrix(request):
    return torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).to(request.param)


def same(one, other):
    return fingerprint(one, one.dtype) == fingerprint(other, one.dtype)


def test_the_order_of_rows_does_not_matter(matrix):
    assert same(matrix, matrix[torch.randperm(50, generator=torch.Generator().manual_seed(2))])


def test_everything_else_does(matrix):
    nearest = matrix.clone()
    nearest[3, 4] = torch.nextafter(nearest[3, 4].float(), torch.tensor(9.0)) if matrix.dtype == torch.float32 else 9.0
    moved = matrix.clone()
    moved[[0, 1], 2] = moved[[1, 0], 2]  # the values of a column, in other rows
    twice = matrix.clone()
    twice[1] = twice[0]
    for other in (nearest, moved, twice, matrix.flip(1), matrix[:-1], matrix.view(25, 24), -matrix):
        assert not same(matrix, other)


def test_a_vector_is_one_row():
    vector = torch.arange(6.0)
    assert same(vector, vector.clone()) and not same(vector, vector.flip(0))


def test_parts_of_a_large_tensor_add_up(monkeypatch):
    matrix = torch.randn(64, 16)
    whole = fingerprint(matrix, matrix.dtype)
    monkeypatch.setattr("llmpipe.verify.inventory._CHUNK", 48)
    assert fingerprint(matrix, matrix.dtype) == whole


def test_rounding_is_measured_against_the_value():
    assert not lossy(torch.bfloat16, torch.float32) and lossy(torch.bfloat16, torch.float16)
    assert largest_rounding(torch.tensor([1.0, 2.0]), torch.bfloat16) == 0
    assert largest_rounding(torch.tensor([1.0, 256 + 1.0]), torch.bfloat16) == pytest.approx(1 / 257)
    assert largest_rounding(torch.tensor([1e6]), torch.float16) == float("inf")


def test_the_tightest_control_group_counts(tmp_path):
    """cgroup v2 as Linux shows it: a limit of the job above one of the step."""
    job = tmp_path / "job"
    step = job / "step"
    step.mkdir(parents=True)
    for folder, limit in ((job, "1000"), (step, "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("300\n")
    assert _group_limits(tmp_path, "0::/job/step\n") == [700]
