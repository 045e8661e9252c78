"""Run a function in several gloo processes on this machine: rank-file verification, the export check, tests."""

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = timedelta(minutes=10)
PR_SET_PDEATHSIG = 1
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch's name of how ranks talk, by the device that they compute on."""


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, device: str = "cpu") -> list[Any]:
    """Call `function(*arguments)` in each of `world_size` forked ranks; return what each returned, by rank.

    The ranks meet by gloo, with "cuda" also by NCCL, each on the GPU of its number. A rank that raises ends the others
    and its traceback is raised here. Forked processes cannot use CUDA if this one already does.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank, args=(function, rank, world_size, folder, pipe[1], arguments, device), daemon=True
            )
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, sender) in zip(ranks, pipes, strict=True):
            process.start()
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes])
        finally:
            for process in ranks:
                process.terminate()
                process.join()


def _collect(receivers: list[Connection]) -> list[Any]:
    """Each rank's result; the first failure, in time, is raised."""
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    while waiting:
        for receiver in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(receiver)  # type: ignore[arg-type]
            try:
                failure, results[rank] = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                failure = "the process died"
            if isinstance(failure, Exception):
                raise failure
            if failure:
                raise RuntimeError(f"rank {rank} of {len(receivers)} failed:\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    arguments: tuple[Any, ...],
    device: str,
) -> None:
    """The body of one rank's process."""
    import torch
    import torch.distributed as dist

    from llmpipe.errors import UserError

    die_with_parent(signal.SIGKILL)
    gc.freeze()  # the parent's objects, perhaps millions, are neither looked through nor copied at each collection
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            BACKENDS[device],
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
        result = (None, function(*arguments))
        dist.barrier()
        dist.destroy_process_group()
    except UserError as error:
        result = (error, None)
    except Exception:
        result = (traceback.format_exc(), None)
    sender.send(result)
    sender.close()
    os._exit(0)  # no atexit hooks of the parent
