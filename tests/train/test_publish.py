"""Publishing: what a device holds meanwhile, and how long ranks wait for those that write."""

import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from jobs import RECIPE, make_job

from llmpipe.parallel.processes import run_ranks
from llmpipe.train import loop, publish
from llmpipe.train.job import Job

SHORT = replace(RECIPE, steps=1)


def most_whole_at_once(job: Job) -> int:
    """The most whole parameters that this rank has while it publishes."""
    original, made, most = publish._whole, list[weakref.ref[torch.Tensor]](), 0

    def counted(parameter: torch.Tensor) -> torch.Tensor:
        nonlocal most
        whole = original(parameter)
        made.append(weakref.ref(whole))
        most = max(most, sum(one() is not None for one in made))
        return whole

    publish._whole = counted
    assert loop.train(job)
    return most


def test_one_parameter_at_a_time_is_whole_on_a_rank_that_writes_nothing(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", SHORT, dp=2)
    assert run_ranks(most_whole_at_once, 2, job)[1] == 1


def publish_late(job: Job, seconds: float, minutes: float) -> bool:
    """On a disk that takes so long, given so many minutes."""
    original = publish.rank_files.write_rank

    def write_late(*given: Any) -> str:
        time.sleep(seconds)
        return original(*given)

    publish.rank_files.write_rank, publish.WRITE_MINUTES = write_late, minutes
    return loop.train(job)


def test_ranks_wait_longer_for_a_file_than_for_a_step(checkpoint, dataset, tmp_path) -> None:
    job = replace(make_job(checkpoint, dataset, tmp_path / "run", SHORT, dp=2), timeout_minutes=0.1)
    assert run_ranks(publish_late, 2, job, 9, publish.WRITE_MINUTES) == [True, True]
    assert job.is_finished()


def test_they_give_up_one_that_hangs(checkpoint, dataset, tmp_path) -> None:
    job = replace(make_job(checkpoint, dataset, tmp_path / "run", SHORT, dp=2), timeout_minutes=0.1)
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*_publish_weights(.|\n)*([Tt]imed out|timeout)"):
        run_ranks(publish_late, 2, job, 60, 0.1)
    assert not (job.run / "weights").exists()
