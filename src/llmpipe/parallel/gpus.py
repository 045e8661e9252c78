"""Which GPUs of this machine a process takes: each belongs to one llmpipe process at a time, until that ends.

There is a lock for each GPU, by its UUID, which is the same in every process of the machine, whatever
CUDA_VISIBLE_DEVICES or a scheduler's container numbers it as.
"""

import fcntl
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.programs import ask

VARIABLE = "CUDA_VISIBLE_DEVICES"
LOCKS = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
"""Of the machine: a folder that other nodes share would have them wait for each other."""
WAIT_SECONDS, POLL, ASK_SECONDS = 600.0, 1.0, 60.0
log = logging.getLogger(__name__)


def check_device(layout: Layout) -> None:
    """UserError if this node has fewer GPUs than the layout wants."""
    import torch  # here, for the workflow imports this module

    if layout.device == "cuda" and (found := torch.cuda.device_count()) < layout.gpus_per_node:
        raise UserError(
            f"the layout wants {layout.gpus_per_node} GPUs on each node, and torch sees {found} here:"
            " lower gpus_per_node, or take device: cpu, which runs gloo processes"
        )


@contextmanager
def taken(count: int, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Within the block CUDA_VISIBLE_DEVICES names so many GPUs that no other llmpipe process of this machine has.

    They are of those that it named before, or of all. UserError if others do not give up enough of them in time. CUDA
    reads the variable when it is first used in a process.
    """
    before = os.environ.get(VARIABLE)
    locks = _wait_for(count, visible(), wait_seconds) if count else {}
    try:
        if locks:
            os.environ[VARIABLE] = ",".join(locks)
        yield
    finally:
        if locks:
            os.environ.pop(VARIABLE, None) if before is None else os.environ.update({VARIABLE: before})
        for descriptor in locks.values():
            os.close(descriptor)


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES may name them: by UUID where nvidia-smi tells it."""
    uuids, told = _uuids(), os.environ.get(VARIABLE)
    if told is None:
        return uuids
    names = [name.strip() for name in told.split(",") if name.strip()]
    return [uuids[int(name)] if name.isdecimal() and int(name) < len(uuids) else name for name in names]


def _uuids() -> list[str]:
    """The UUIDs of the GPUs that the driver shows here, in its order; their numbers where it cannot be asked."""
    try:
        answer = ask("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader", seconds=ASK_SECONDS)
        if answer.returncode == 0:
            return answer.stdout.split()
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi does not answer within {ASK_SECONDS:g} s: the driver of this machine's GPUs hangs; look at"
            " dmesg, start the machine anew, or take another one"
        ) from error
    except OSError:
        pass
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _wait_for(count: int, names: list[str], wait_seconds: float) -> dict[str, int]:
    """The locks of `count` of these GPUs, as open files."""
    if count > len(names):
        known = f"{VARIABLE} names {len(names)}" if VARIABLE in os.environ else f"this machine has {len(names)}"
        raise UserError(
            f"{count} GPUs are wanted, and {known}{': ' if names else ''}{', '.join(names)}: take a layout or --tp of"
            " fewer, or a machine, or a job, with more; where Snakemake starts it, --resources gpu=N tells it how many"
            " there are"
        )
    deadline, told = time.monotonic() + wait_seconds, False
    while len(locks := _lock_free(names, count)) < count:
        found = f"{count} of the GPUs {', '.join(names)} are wanted, and other llmpipe processes here have too many"
        if time.monotonic() > deadline:
            raise UserError(
                f"{found}: wait for them, or end them (nvidia-smi lists them); where Snakemake starts them,"
                " --resources gpu=N tells it how many GPUs there are"
            )
        if not told:
            log.warning("%s: waiting up to %.0f s", found, wait_seconds)
        told = True
        time.sleep(POLL)
    return locks


def _lock_free(names: list[str], count: int) -> dict[str, int]:
    """Locks of `count` GPUs that are free now, or of none; one process at a time looks, so that no two take halves."""
    locks: dict[str, int] = {}
    gate = _gate()
    if gate is None:
        return {}
    try:
        for name in names:
            if len(locks) < count and (descriptor := _locked(name)) is not None:
                locks[name] = descriptor
        if len(locks) == count:
            return locks
        for descriptor in locks.values():
            os.close(descriptor)
        return {}
    finally:
        os.close(gate)


def _gate() -> int | None:
    """The lock of the one process that looks; None if another one, which perhaps stands still, has it for long."""
    deadline = time.monotonic() + POLL
    while (gate := _locked("all")) is None and time.monotonic() < deadline:
        time.sleep(POLL / 100)
    return gate


def _locked(name: str) -> int | None:
    """The lock of one GPU; None if another process has it."""
    descriptor = _open(name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _open(name: str) -> int:
    """A lock's file, which stays for ever. Any user can lock it, and none but its maker write it."""
    path = LOCKS / f"llmpipe-gpu-{name.replace('/', '_')}.lock"
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL)
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
    return os.open(path, os.O_RDONLY)
