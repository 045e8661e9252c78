"""How the ranks that torchrun starts meet, and which of them do not: a process group alone would only hang.

Rank 0 serves a store. Every rank answers there when its device has done a first bit of work; then they make their
process group and sum up once. What is waited for is short, and who is missing is named.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # dist's, where no type checker finds them

from llmpipe.background import in_background
from llmpipe.errors import UserError
from llmpipe.parallel.compat import set_timeouts

T = TypeVar("T")
ANSWER = timedelta(minutes=2)
"""Within which all ranks have to be there: where thousands load torch from one file system, that takes a while."""
FAILURE_SECONDS = 3.0
"""Within which ranks that fail together do so."""
SERVING_SECONDS = 10.0
"""For which rank 0 lets others ask who is missing."""


def meet(backend: str, timeout: timedelta, answer: timedelta = ANSWER) -> Store:
    """Make the default process group of all ranks, whose operations may take `timeout`; returns the ranks' store.

    UserError, naming the ranks and nodes, if some do not answer in time, or if a sum over all does not come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank, answer)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "nccl" in backend else torch.device("cpu")
    one = torch.ones((), device=device)
    assert one.item() == 1  # the device answers
    wait = answer.total_seconds()
    try:
        missing = _within(2 * wait + 2 * SERVING_SECONDS, lambda: _call_roll(store, rank, world_size, answer))
    except TimeoutError:
        missing = f"rank 0 on node 0 did not answer within {answer.seconds} s"  # which serves the store
    if missing:
        raise UserError(f"{missing}: look at its log, its GPU and its network, or leave that node out")

    def sum_up() -> None:
        group = PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world_size, timeout=answer)
        set_timeouts(timeout)
        work = dist.all_reduce(one, async_op=True)
        assert work is not None
        work.wait(answer)

    start = time.monotonic()
    try:
        _within(2 * wait + FAILURE_SECONDS, sum_up)
    except (RuntimeError, TimeoutError) as error:
        if time.monotonic() - start < wait / 2:  # it waited for nobody
            raise
        raise UserError(f"{_without_sum(silent(store), world_size)} ({error})") from error
    return store


def _without_sum(others: str, world_size: int) -> str:
    """Who took no part in the first sum, or, where all wait for it in vain, what may be the reason."""
    if others:
        return (
            f"{others} answered, and then took no part in a sum over all ranks: look at its log, its GPU and its"
            " network, or leave that node out"
        )
    return f"all {world_size} ranks answered, but a sum over them did not come: look at the network between their nodes"


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What some work comes to; TimeoutError where it does not end: a rank 0 that hangs answers nothing, for ever."""
    return in_background(work).result(seconds)


def _store(rank: int, answer: timedelta) -> Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(host, port, is_master=rank == 0, timeout=answer, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} does not reach rank 0 at {host}:{port} within {answer.seconds} s: is node 0 up, and does a"
            " firewall let this node through to it?"
        ) from error


def _call_roll(store: Store, rank: int, world_size: int, answer: timedelta) -> str:
    """Who did not answer, on all ranks: rank 0 waits for them and tells; "" if all did."""
    store.set(f"here/{rank}", socket.gethostname())
    if rank == 0:
        with suppress(dist.DistStoreError):
            store.wait([f"here/{other}" for other in range(world_size)], answer)
        absent = [other for other in range(world_size) if not store.check([f"here/{other}"])]
        said = f"{_places(store, absent, world_size)} did not answer within {answer.seconds} s" if absent else ""
        store.set("roll", said)
    store.wait(["roll"], answer + timedelta(seconds=SERVING_SECONDS))
    missing = store.get("roll").decode()
    store.set(f"heard/{rank}", "")
    if missing and rank == 0:
        _serve(store, "here", "heard", world_size, SERVING_SECONDS)
    return missing


def _serve(store: Store, came: str, left: str, world_size: int, seconds: float) -> None:
    """Rank 0 serves the store: it does not leave before those that came know what they asked."""
    there = [other for other in range(world_size) if store.check([f"{came}/{other}"])]
    with suppress(dist.DistStoreError):
        store.wait([f"{left}/{other}" for other in there], timedelta(seconds=seconds))


def _places(store: Store, ranks: list[int], world_size: int) -> str:
    """Ranks by node, and the name of the node where another rank of it told that."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    said = []
    for node in sorted({rank // each for rank in ranks}):
        there = range(node * each, min((node + 1) * each, world_size))
        hosts = [store.get(f"here/{rank}").decode() for rank in there if store.check([f"here/{rank}"])]
        of_node = ", ".join(str(rank) for rank in ranks if rank in there)
        said.append(f"rank {of_node} on node {node} ({hosts[0] if hosts else 'none of its ranks did'})")
    return "; ".join(said)


def silent(store: Store) -> str:
    """When this rank has failed: the ranks that do not say so too, by node; they hang, or are dead. "" if all do."""
    try:
        return _within(3 * FAILURE_SECONDS, lambda: _not_failed(store))
    except TimeoutError:
        return "rank 0 on node 0"  # which serves the store


def _not_failed(store: Store) -> str:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store.set(f"failed/{rank}", "")
        time.sleep(FAILURE_SECONDS)
        ranks = [other for other in range(world_size) if not store.check([f"failed/{other}"])]
        places = _places(store, ranks, world_size) if ranks else ""
        store.set(f"asked/{rank}", "")
        if rank == 0:
            _serve(store, "failed", "asked", world_size, FAILURE_SECONDS)
        return places
    except RuntimeError:
        return "rank 0 on node 0"
