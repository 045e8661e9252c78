"""Starts the ranks of a training, and ends them in order: srun and torchrun in a Slurm job, torchrun elsewhere.

In a Slurm job with several nodes, srun starts this same command again, with --master, once on each node; there, and
everywhere else, torchrun starts the ranks. Without a scheduler a person starts it on each node with --node-rank and
--master.

To make a training stop: SIGTERM, SIGINT or SIGHUP to a launcher, or `touch RUN/stop`. A signal only becomes that
file, which the ranks look for after each step; torchrun and the ranks ignore these signals, for torchrun kills its
ranks 30 s after it got one, and srun at once. Exit status 0: trained; 75: stopped as asked and saved; else failed.
"""

import fcntl
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel.processes import die_with_parent
from llmpipe.train import failure
from llmpipe.train.job import Job

STOPPED = os.EX_TEMPFAIL  # 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESTARTS = 3  # of failed ranks, in place
STOP_SECONDS = 120  # from the signal to the time limit
THREADS_PER_GPU = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this launcher runs, and how long."""

    node_rank: int = 0
    master: str | None = None
    """HOST:PORT of the node with rank 0; given, this is one node of several."""
    threads: int = 1
    """CPU threads of this node for all its ranks."""
    restarts: int = RESTARTS
    """How often failed ranks are started again, in place."""
    exit_after_minutes: float = 0.0
    """When the training is asked to stop, counted from here; 0: never."""


def resources(layout: Layout) -> dict[str, Any]:
    """The Snakemake resources of a training job, right for the Slurm plugin and for one machine.

    One launcher a node. `tasks_per_gpu` 0 keeps the plugin from turning `tasks` into --ntasks-per-gpu, and a true
    `mpi` (several nodes) keeps it from putting an srun of its own around the command; it refuses one for one task.
    `gpu` is the total, which `--resources gpu=N` counts on one machine and the plugin hands on as --gpus;
    --gpus-per-node, beside it, spreads them. TERM comes ahead of the time limit: the launcher saves and stops.
    """
    has_gpus = layout.device == "cuda"
    per_node = f"--gpus-per-node={layout.gpus_per_node} " if has_gpus else ""
    return {
        "threads": layout.gpus_per_node * (THREADS_PER_GPU if has_gpus else 1),
        "mpi": "srun" if layout.nodes > 1 else "",
        "nodes": layout.nodes,
        "tasks": layout.nodes,
        "tasks_per_gpu": 0,
        "gpu": layout.processes if has_gpus else 0,
        "slurm_extra": f"{per_node}--signal=TERM@{STOP_SECONDS}",
    }


def launch(job: Job, place: Place, log_file: Path | None, wait_seconds: float) -> int:
    """Train a job; returns the exit status."""
    run, variables = job.run, environment(job.layout, place)
    if place.master and ("SLURM_STEP_ID" in os.environ or place.node_rank):
        # The launcher with the lease says what it comes to: srun takes 75 of one node for a failure.
        return _supervise(_torchrun(job, place, log_file), run, variables)
    with lease(run, wait_seconds):
        if job.is_finished():
            log.info("%s: this training is finished", run)
            return 0
        # of another training into this folder, of an earlier stop or failure
        for left in ("run.json", "stop", failure.NAME):
            (run / left).unlink(missing_ok=True)
        job.write()
        with _asked_to_stop_after(run, place.exit_after_minutes):
            code = _supervise(_command(job, place, log_file), run, variables)
    if code or failure.has_to_end(run):
        raise UserError(f"training failed {failure.digest(run)}; see {run / 'log.txt'}; {_resumes_from(job)}")
    return 0 if (run / "run.json").exists() else STOPPED


def _resumes_from(job: Job) -> str:
    newest = max((path.parent for path in job.checkpoints.glob("step-*/manifest.json")), default=None)
    goes_on = f"goes on from {newest}" if newest else "begins at the start, for no checkpoint was saved"
    return f"this command {goes_on}: llmpipe {shlex.join(sys.argv[1:])}"


@contextmanager
def _asked_to_stop_after(run: Path, minutes: float) -> Iterator[None]:
    """Make the file RUN/stop after so many minutes; 0: never."""
    timer = Timer(minutes * 60, (run / "stop").touch)
    if minutes:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _command(job: Job, place: Place, log_file: Path | None) -> list[str]:
    """srun for the nodes of a Slurm job, torchrun for one node."""
    layout = job.layout
    in_job, in_step = "SLURM_JOB_ID" in os.environ, "SLURM_STEP_ID" in os.environ
    if place.master or (layout.nodes == 1 and (in_step or not in_job)):
        return _torchrun(job, place, log_file)
    if not in_job:
        raise UserError(
            f"{layout.nodes} nodes take a Slurm job, or on each node this command with --node-rank R --master HOST:PORT"
        )
    return _srun(layout, place)


def _srun(layout: Layout, place: Place) -> list[str]:
    """This command again, once on each node of the Slurm job."""
    host = socket.gethostname()
    if "SLURMD_NODENAME" not in os.environ:  # a shell of salloc on the login node
        names = subprocess.check_output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], text=True)
        host = names.split()[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000
    nodes = layout.nodes
    return [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={place.threads}",
        "--kill-on-bad-exit=1", "--overlap", "--label",
        sys.executable, "-m", "llmpipe", *sys.argv[1:], f"--master={host}:{port}",
    ]  # fmt: skip


def _torchrun(job: Job, place: Place, log_file: Path | None) -> list[str]:
    """The ranks of this node."""
    layout = job.layout
    rendezvous = ["--standalone"]
    if layout.nodes > 1:  # c10d: ranks of a static rendezvous cannot be restarted in place
        rendezvous = [
            f"--nnodes={layout.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={place.master}",
            f"--rdzv-id={job.run.name}", f"--rdzv-conf=is_host={int(place.node_rank == 0)}",
        ]  # fmt: skip
    return [
        sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={layout.gpus_per_node}",
        f"--max-restarts={place.restarts}", "--signals-to-handle=SIGQUIT",
        "-m", "llmpipe.train", str(job.path), *([str(log_file)] if log_file else []),
    ]  # fmt: skip


def environment(layout: Layout, place: Place) -> dict[str, str]:
    """What the ranks' processes find in their environment."""
    return os.environ | {
        "OMP_NUM_THREADS": str(max(1, place.threads // layout.gpus_per_node)),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted gloo ranks call the dead attempt's ports
    }


def _supervise(argv: list[str], run: Path, variables: dict[str, str]) -> int:
    """Run a command to its end and return its exit status; signals become the file RUN/stop."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: (run / "stop").touch())
    # In a session of its own, where neither Ctrl-C nor `scancel --full` finds it.
    code = subprocess.Popen(argv, env=variables, preexec_fn=_shield, start_new_session=True).wait()
    return code if code >= 0 else 128 - code


def _shield() -> None:
    """In the child, before it becomes the command: ignore the signals; SIGQUIT, which torchrun heeds, if we die."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGQUIT)


@contextmanager
def lease(run: Path, wait_seconds: float) -> Iterator[None]:
    """Keep a second trainer on this machine out of the run folder; UserError when the first does not end in time."""
    run.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with (run / "lease").open("a+") as file:
        told = False
        while not _locked(file.fileno()):
            file.seek(0)
            holder = file.read() or "another process"
            if time.monotonic() > deadline:
                raise UserError(f"{run} is being trained by {holder}: end that or wait for it, then run this again")
            if not told:
                log.warning("%s is being trained by %s: waiting up to %.0f s for it", run, holder, wait_seconds)
            told = True
            time.sleep(1)
        file.truncate(0)
        file.write(
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")})
        )
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
