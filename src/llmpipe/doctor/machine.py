"""The machine: cores and memory, the disk that results go to, shared memory."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmpipe.doctor.finding import GIB, Finding, mend, note, ok

SMALL_DISK, FULL_DISK = 200 * GIB, 2 * GIB
SMALL_SHM = GIB
SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "glusterfs", "wekafs")
"""How the kinds of file systems begin that several machines may write."""


def cores() -> Iterator[Finding]:
    """What this process may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield ok("CPU", f"{len(os.sched_getaffinity(0))} cores for this process, {memory / GIB:.0f} GiB of memory")


def disk(folder: Path) -> Iterator[Finding]:
    """Where results go."""
    if not os.access(folder, os.W_OK):
        yield mend("disk", f"{folder} may not be written", "start llmpipe from a folder of yours")
        return
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GIB:,.0f} of {usage.total / GIB:,.0f} GiB free in {folder.resolve()}, {file_system(folder)}"
    if usage.free < FULL_DISK:
        yield mend("disk", found, "make room: training checkpoints and exports would not fit")
    elif usage.free < SMALL_DISK:
        advice = "enough for small models: a 7B takes 13 GB as a checkpoint, and 81 GB for each training checkpoint"
        yield note("disk", found, advice)
    else:
        yield ok("disk", found)


def file_system(path: Path) -> str:
    """Its kind, as ext4 or nfs4; empty where Linux does not say."""
    mounts = Path("/proc/self/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    found = [(fields[1], fields[2]) for line in lines if len(fields := line.split()) > 2]
    place = path.resolve()
    within = [(point, kind) for point, kind in found if place.is_relative_to(point.replace("\\040", " "))]
    return max(within, key=lambda mount: len(mount[0]), default=("", ""))[1]


def is_shared(kind: str) -> bool:
    """Whether a file system of this kind may be other machines' too."""
    return kind.startswith(SHARED)


def shared_memory(path: Path = SHM) -> Iterator[Finding]:
    """What NCCL passes data through between GPUs without a direct link."""
    if not path.is_dir():
        yield note(str(path), "missing", "NCCL wants it between GPUs of a machine: mount a tmpfs there")
        return
    size = shutil.disk_usage(path).total
    if size < SMALL_SHM:
        advice = "NCCL may want more between GPUs of a machine: docker run --shm-size=8g"
        yield note(str(path), f"{size / GIB:.2g} GiB", advice)
    else:
        yield ok(str(path), f"{size / GIB:.0f} GiB")


def locked_memory(adapters: Path = INFINIBAND) -> Iterator[Finding]:
    """What RDMA takes: Slurm gives jobs the limits of the shell that submitted them, unless it is told not to."""
    if not adapters.is_dir() or not list(adapters.iterdir()):
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        yield ok("locked memory", "no limit, as InfiniBand wants it")
    else:
        advice = "NCCL over InfiniBand fails or falls back: no limit is wanted where jobs are submitted (ulimit -l)"
        yield note("locked memory", f"{limit / 1024:,.0f} KiB", advice)
