"""Deterministic kernels, and the word on those that are not."""

import logging
from dataclasses import replace

import torch
from jobs import RECIPE, make_job

from llmpipe.parallel.processes import run_ranks
from llmpipe.train.determinism import use_deterministic_kernels
from llmpipe.train.job import Job
from llmpipe.train.loop import train


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def said() -> list[str]:
    kept = Kept()
    logging.getLogger("llmpipe.train.determinism").addHandler(kept)
    use_deterministic_kernels()
    for _ in range(2):
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))  # whose order of writing torch leaves open
        torch.ones(3, 3) @ torch.ones(3)
    return kept.lines


def test_a_kernel_that_cannot_be_is_named_once() -> None:
    (lines,) = run_ranks(said, 1)
    assert len(lines) == 1 and lines[0].startswith("deterministic: put_ cannot be")


def trained(job: Job) -> bool:
    train(job)
    return torch.are_deterministic_algorithms_enabled()


def test_the_recipe_decides(checkpoint, dataset, tmp_path) -> None:
    for deterministic in (True, False):
        recipe = replace(RECIPE, steps=1, deterministic=deterministic)
        job = make_job(checkpoint, dataset, tmp_path / str(deterministic), recipe)
        assert run_ranks(trained, 1, job) == [deterministic]
