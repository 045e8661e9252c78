"""How the ranks that torchrun starts meet, and which of them do not: a process group alone would only hang.

Rank 0 serves a store. Every rank answers there when its device has done a first bit of work; then they make their
process group and sum up once. What is waited for is short, and who is missing is named.
"""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # dist's, where no type checker finds them

from llmpipe.errors import UserError

ANSWER = timedelta(minutes=2)
"""Within which all ranks have to be there: where thousands load torch from one file system, that takes a while."""
FAILURE_SECONDS = 3.0
"""Within which ranks that fail together do so."""


def meet(backend: str, timeout: timedelta, answer: timedelta = ANSWER) -> Store:
    """Make the default process group of all ranks, whose operations may take `timeout`; returns the ranks' store.

    UserError, naming the ranks and nodes, if some do not answer in time, or if a sum over all does not come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank, answer)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "nccl" in backend else torch.device("cpu")
    one = torch.ones((), device=device)
    assert one.item() == 1  # the device answers
    store.set(f"here/{rank}", socket.gethostname())
    _call_roll(store, rank, world_size, answer)
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        work = dist.all_reduce(one, async_op=True)
        assert work is not None
        work.wait(answer)
    except RuntimeError as error:
        raise UserError(
            f"all {world_size} ranks answered, but a sum over them did not come within {answer.seconds} s: look at the"
            f" network between their nodes ({error})"
        ) from error
    return store


def _store(rank: int, answer: timedelta) -> Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(host, port, is_master=rank == 0, timeout=answer, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} does not reach rank 0 at {host}:{port} within {answer.seconds} s: is node 0 up, and does a"
            " firewall let this node through to it?"
        ) from error


def _call_roll(store: Store, rank: int, world_size: int, answer: timedelta) -> None:
    """UserError on all ranks if some did not answer: rank 0 waits for them and tells."""
    if rank == 0:
        try:
            store.wait([f"here/{other}" for other in range(world_size)], answer)
        except dist.DistStoreError:
            missing = [other for other in range(world_size) if not store.check([f"here/{other}"])]
            store.set("roll", f"{_places(store, missing, world_size)} did not answer within {answer.seconds} s")
        else:
            store.set("roll", "")
    store.wait(["roll"], answer + timedelta(seconds=10))
    missing = store.get("roll").decode()
    store.set(f"heard/{rank}", "")
    if missing:
        if rank == 0:
            _wait_until_heard(store, world_size)
        raise UserError(f"{missing}: look at its log, its GPU and its network, or leave that node out")


def _wait_until_heard(store: Store, world_size: int) -> None:
    """Rank 0 serves the store: it does not leave before those that answered know why."""
    there = [other for other in range(world_size) if store.check([f"here/{other}"])]
    with suppress(dist.DistStoreError):
        store.wait([f"heard/{other}" for other in there], timedelta(seconds=10))


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
    said: list[str] = []
    asking = Thread(target=lambda: said.append(_not_failed(store)), daemon=True)
    asking.start()
    asking.join(3 * FAILURE_SECONDS)
    return said[0] if said else "rank 0 on node 0"  # which serves the store: one that hangs answers nothing, for ever


def _not_failed(store: Store) -> str:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store.set(f"failed/{rank}", "")
        time.sleep(FAILURE_SECONDS)
        ranks = [other for other in range(world_size) if not store.check([f"failed/{other}"])]
        return _places(store, ranks, world_size) if ranks else ""
    except RuntimeError:
        return "rank 0 on node 0"
