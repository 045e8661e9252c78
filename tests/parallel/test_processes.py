"""Functions in several gloo processes."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks


def add_up(base: int) -> int:
    total = torch.tensor(base + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def test_every_ranks_result_comes_back() -> None:
    assert run_ranks(add_up, 3, 10) == [33, 33, 33]


def fail_on_rank_1(kind: str) -> None:
    if dist.get_rank() == 1:
        if kind == "user":
            raise UserError("what the user did")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("a bug")
    dist.barrier()


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("user", UserError, "what the user did"),
        ("bug", RuntimeError, "KeyError: 'a bug'"),
        ("killed", RuntimeError, "rank . of 2 failed"),
    ],
)
def test_a_ranks_failure_is_raised_here(kind: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run_ranks(fail_on_rank_1, 2, kind)
