"""Deterministic kernels, and the word on those that are not."""

from dataclasses import replace

import pytest
import torch
from jobs import RECIPE, make_job

from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks
from llmpipe.train import loop
from llmpipe.train.determinism import deterministic_kernels
from llmpipe.train.job import Job


def test_a_kernel_that_cannot_be_is_named(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    with pytest.raises(UserError, match="deterministic: put_ cannot be"), deterministic_kernels():
        torch.ones(3, 3) @ torch.ones(3)
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))  # whose order of writing torch leaves open
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="another"), deterministic_kernels():
        raise RuntimeError("another")


def modes(job: Job) -> list[tuple[bool, bool]]:
    """Of each step: are kernels deterministic, and does torch only warn of those that are not?"""
    found, gradient = [], loop.gradient

    def looked_at(*arguments):
        found.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        return gradient(*arguments)

    loop.gradient = looked_at
    loop.train(job)
    return found


def test_the_recipe_decides(checkpoint, dataset, tmp_path) -> None:
    for deterministic in (True, False):
        recipe = replace(RECIPE, steps=1, deterministic=deterministic)
        job = make_job(checkpoint, dataset, tmp_path / str(deterministic), recipe)
        assert run_ranks(modes, 1, job) == [[(deterministic, False)]]
