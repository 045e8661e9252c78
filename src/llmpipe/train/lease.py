"""One trainer at a time in a run folder: the file RUN/lease says which, and each write of a rank asks it.

    {"token": "9f3c…", "pid": 4711, "started": 1234567, "host": "node7", "machine": "…", "job": "815",
     "cluster": "…", "since": "…"}

The launcher that holds it touches the file every HEARTBEAT seconds and removes it at its end. Another takes it over
once the holder has ended: Slurm does not run its job any more, or its process is gone from this machine; where neither
can be asked, when nothing touched the file for STALE seconds while the other watched, so that no clocks are compared.
File locks play no part: on many shared file systems they do not reach another node.

All that can be wrong: a process that stood still, or was cut off, may go on after it was given up. Hence the ranks know
their launcher's token, and stop before they write once the file holds another one.
"""

import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

from llmpipe.errors import UserError
from llmpipe.files import aside
from llmpipe.programs import ask

NAME = "lease"
TOKEN = "LLMPIPE_LEASE"
"""What the ranks find their launcher's token under, in their environment."""
HEARTBEAT, STALE, POLL, SQUEUE_SECONDS = 10.0, 60.0, 2.0, 30.0
SLURM_POLL = 10.0
"""Seconds between two questions to Slurm, which many users ask."""
JOB, CLUSTER = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_CLUSTER_NAME")
TRAINING = ("CONFIGURING", "RUNNING", "SUSPENDED")
"""States of a job that has nodes, and keeps them."""
log = logging.getLogger(__name__)


def this_machine() -> str:
    """Where a process number says which process: this boot of this machine, and in it this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease."""

    token: str
    pid: int
    started: str | None
    """When the process started, in clock ticks since boot: numbers of processes come again."""
    host: str
    machine: str
    job: str | None
    """Slurm's."""
    cluster: str | None
    """Whose number that is."""
    since: str

    def __str__(self) -> str:
        job = f" in Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


@contextmanager
def hold(run: Path, wait_seconds: float) -> Iterator[str]:
    """Hold the run folder's lease, and give its token; UserError when another trainer does not end in time."""
    run.mkdir(parents=True, exist_ok=True)
    token, done = uuid4().hex, Event()
    _wait_and_take(run, token, wait_seconds)
    heart = Thread(target=_beat, args=(run, token, done), daemon=True)
    heart.start()
    try:
        yield token
    finally:
        done.set()
        heart.join()
        if held(run, token):
            (run / NAME).unlink()


def held(run: Path, token: str | None = None) -> bool:
    """Whether the lease is still that of a token, or of this rank's launcher; true where there was no launcher."""
    token = token or os.environ.get(TOKEN)
    holder, _ = read(run)
    return token is None or (holder is not None and holder.token == token)


def check(run: Path, token: str | None = None) -> None:
    """UserError if another trainer has taken the run folder over."""
    if not held(run, token):
        raise UserError(lost(run))


def lost(run: Path) -> str:
    """What is said by those who have lost the lease."""
    holder, _ = read(run)
    who = f"by {holder}" if holder else "by another trainer, which has ended"
    return f"{run} was taken over {who}: this training had stood still or been cut off, and ends without saving"


def read(run: Path) -> tuple[Holder | None, int]:
    """Who holds a run folder's lease, and when it was last touched, in ns; None where nobody does."""
    try:
        with (run / NAME).open() as file:  # asks a shared file system for the newest, as looking it up need not
            return Holder(**json.load(file)), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, ValueError, TypeError):
        return None, 0


def queue_behind(run: Path) -> str:
    """sbatch's option that has a job wait in the queue, without nodes, for the one that trains; "" where none does."""
    holder, _ = read(run)
    return f" --dependency=afterany:{holder.job}" if holder and _job_state(holder) in TRAINING else ""


def trained_still(runs: Path) -> list[str]:
    """What to tell whoever starts Snakemake: a line for each run that a Slurm job of an earlier Snakemake trains."""
    return [
        f"{path.parent} is being trained by {holder}: its next job waits in the queue until that one has ended"
        f" (scancel --signal=TERM {holder.job} makes it save and end)"
        for path in sorted(runs.glob(f"*/{NAME}"))
        if (holder := read(path.parent)[0]) and _job_state(holder) in TRAINING
    ]


def _beat(run: Path, token: str, done: Event) -> None:
    """Touch the lease until its holder is done."""
    while not done.wait(HEARTBEAT):
        with suppress(OSError):  # a file system that fails for a while
            if held(run, token):
                os.utime(run / NAME)


def _wait_and_take(run: Path, token: str, wait_seconds: float) -> None:
    deadline, last_beat, seen, told = time.monotonic() + wait_seconds, -1, time.monotonic(), False
    while True:
        holder, beat = read(run)
        if beat != last_beat:
            last_beat, seen = beat, time.monotonic()
        if holder is None or not _is_alive(holder, quiet=time.monotonic() - seen):
            if _take(run, token, holder):
                return
            continue
        if time.monotonic() > deadline:
            raise UserError(f"{run} is being trained by {holder}: end that or wait for it, then run this again")
        if not told:
            log.warning("%s is being trained by %s: waiting up to %.0f s for it", run, holder, wait_seconds)
        told = True
        time.sleep(SLURM_POLL if holder.job else POLL)


def _take(run: Path, token: str, ended: Holder | None) -> bool:
    """Write ourselves into the lease, in the place of one who has ended, if there is one; False: another was faster."""
    path, mine = run / NAME, aside(run / NAME)
    mine.write_text(json.dumps(asdict(_ourselves(token))) + "\n")
    try:
        if not path.exists():
            os.link(mine, path)  # of several, one can
        elif read(run)[0] == ended:
            if ended:
                log.warning("%s: taking over from %s, which has ended", run, ended)
            mine.replace(path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)
    return held(run, token)


def _ourselves(token: str) -> Holder:
    pid = os.getpid()
    return Holder(
        token,
        pid,
        _started(pid),
        socket.gethostname(),
        this_machine(),
        JOB,
        CLUSTER,
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _is_alive(holder: Holder, quiet: float) -> bool:
    """Whether the holder trains still; `quiet`: for how many seconds we have seen no heartbeat."""
    here = holder.machine == this_machine()
    if JOB and (holder.job, holder.cluster) == (JOB, CLUSTER) and not here:
        return False  # this very job, which Slurm has started again on another node
    state = _job_state(holder)
    if state in ("", "PENDING"):
        return False
    if here and state != "COMPLETING":
        return _started(holder.pid) == holder.started
    return state is not None or quiet < STALE


def _job_state(holder: Holder) -> str | None:
    """What Slurm says of a holder's job: "" when it has ended, None without an answer."""
    elsewhere = CLUSTER and holder.cluster != CLUSTER  # where its number is another job's
    if not holder.job or elsewhere:
        return None
    try:
        answer = ask("squeue", "--noheader", "--jobs", holder.job, "--format", "%T", seconds=SQUEUE_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    return answer.stdout.strip()


def _started(pid: int) -> str | None:
    """When a process of this machine started; None if there is none, or none but its exit status."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]
