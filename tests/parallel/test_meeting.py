"""How ranks meet by a store, and what is said of one that does not come, or stops answering."""

import os
import signal
import socket
import time
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.parallel import meeting


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def fail(*_: object, **__: object) -> None:
    raise ValueError("no GPUs found!")


def run_rank(rank: int, port: int, seconds: float, ends: str, sender: Connection) -> None:
    """One of four ranks on two nodes, that fails or hangs when the group is made, or hangs just before."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if ends == "hangs before":
        dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    if ends == "fails before":
        dist.init_process_group = fail
    try:
        store = meeting.meet("gloo", timedelta(minutes=1), timedelta(seconds=seconds))
        said = f"{dist.get_rank()} of {dist.get_world_size()}"
        if ends == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        if ends == "fails":
            said = meeting.silent(store)
    except UserError as error:
        said = str(error)
    except Exception as error:
        said = repr(error)
    sender.send(said)
    time.sleep(60)  # rank 0 serves the store; it is killed when all have said something
    os._exit(0)


def ranks(seconds: float, ends: dict[int, str]) -> list[str]:
    """What the ranks of `ends` say; those that hang say nothing, the rest of the four is not started."""
    context, port = get_context("fork"), free_port()
    pipes = {rank: context.Pipe(duplex=False) for rank in ends}
    started = [
        context.Process(target=run_rank, args=(rank, port, seconds, ends[rank], pipes[rank][1]), daemon=True)
        for rank in ends
    ]
    for rank, process in zip(ends, started, strict=True):
        process.start()
        pipes[rank][1].close()  # so that a rank that dies without a word is not waited for
    try:
        return [pipes[rank][0].recv() for rank, end in ends.items() if "hangs" not in end]
    finally:
        for process in started:
            process.kill()
            process.join()


def test_all_meet() -> None:
    assert ranks(60, dict.fromkeys(range(4), "")) == [f"{rank} of 4" for rank in range(4)]


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ((0, 1, 2), "rank 3 on node 1 ({host}) did not answer within 4 s"),
        ((0,), "rank 1 on node 0 ({host}); rank 2, 3 on node 1 (none of its ranks did) did not answer within 4 s"),
    ],
)
def test_who_does_not_come_is_named_to_all(there: tuple[int, ...], named: str) -> None:
    said = ranks(4, dict.fromkeys(there, ""))
    assert all(text.startswith(named.format(host=socket.gethostname()) + ": look at its log") for text in said)


def test_without_rank_0_nobody_waits_for_ever() -> None:
    assert "rank 2 does not reach rank 0 at 127.0.0.1:" in ranks(2, {2: ""})[0]


@pytest.mark.parametrize(("hangs", "named"), [(1, "rank 1 on node 0 ({host})"), (0, "rank 0 on node 0")])
def test_who_hangs_is_named_by_those_that_fail(hangs: int, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FAILURE_SECONDS", 1.0)
    said = ranks(60, {rank: "hangs" if rank == hangs else "fails" for rank in range(4)})
    assert said == [named.format(host=socket.gethostname())] * 3


@pytest.mark.parametrize(
    ("hangs", "named"), [(3, "rank 3 on node 1 ({host}) answered, and then took"), (0, "rank 0 on")]
)
def test_who_answers_and_then_hangs_is_named_soon(hangs: int, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FAILURE_SECONDS", 2.0)
    monkeypatch.setattr(meeting, "SERVING_SECONDS", 1.0)
    said = ranks(3, {rank: "hangs before" if rank == hangs else "" for rank in range(4)})
    assert all(text.startswith(named.format(host=socket.gethostname())) for text in said), "\n".join(said)


def test_who_fails_by_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FAILURE_SECONDS", 2.0)
    own, *others = ranks(3, {2: "fails before"} | dict.fromkeys((0, 1, 3), ""))
    assert own == "ValueError('no GPUs found!')"
    assert all(text.startswith("rank 2 on node 1") and "took no part" in text for text in others), "\n".join(others)
