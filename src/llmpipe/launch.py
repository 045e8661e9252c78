"""Starts the ranks of a training, and ends them in order: srun and torchrun in a Slurm job, torchrun elsewhere.

In a Slurm job with several nodes, srun starts this same command again, with --master, once on each node; there, and
everywhere else, torchrun starts the ranks. Without a scheduler a person starts it on each node with --node-rank and
--master (train/first_node.py). One launcher holds the run folder's lease (train/lease.py); its ranks know the token.

To make a training stop: SIGTERM, SIGINT or SIGHUP to a launcher, or `touch RUN/stop`. A signal becomes that file within
a second, which the ranks look for after each step; torchrun and the ranks ignore these signals, for torchrun kills its
ranks 30 s after it got one, and srun at once. Exit status 0: trained; 75: stopped as asked and saved; else failed.
"""

import logging
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel import gpus
from llmpipe.project import configs
from llmpipe.track.follower import followed
from llmpipe.train import failure, first_node, lease, leftovers
from llmpipe.train.job import Job
from llmpipe.train.origin import with_origin
from llmpipe.train.run_folder import is_finished
from llmpipe.train.supervise import StopRequest, supervise_srun, supervise_torchrun
from llmpipe.train.system import watched

STOPPED = os.EX_TEMPFAIL  # 75
RESTARTS = 3  # of failed ranks, in place
NODES_SECONDS = 600  # torchrun waits so long for the other nodes, at the start and when one has died
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
    track_uri: str | None = None
    """The tracking store where the training is seen live; None: nowhere."""
    track_experiment: str = "llmpipe"


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


def resource(run_name: str, name: str) -> Any:
    """One of the resources of a run's training, in a project's folder.

    A job waits for the end of one that trains there still, of an earlier Snakemake.
    """
    found = resources(configs.layout(run_name))[name]
    return found + lease.queue_behind(Path("results/runs", run_name)) if name == "slurm_extra" else found


def launch(job: Job, place: Place, log_file: Path | None, wait_seconds: float) -> int:
    """Train a job; returns the exit status. Waits so long for another trainer of the run, other nodes, free GPUs."""
    if place.master:
        first_node.check_place(job.layout.nodes, place.node_rank, place.master)
    if lease.TOKEN in os.environ:
        # srun's launcher holds the lease, and says what it comes to: srun takes 75 of one node for a failure.
        first_node.check_shared(job)
        return _run_ranks(job, place, log_file, StopRequest(job.run, os.environ[lease.TOKEN]), wait_seconds)
    if place.master and place.node_rank:
        job = job.with_inputs()
        token = first_node.wait_for_first(job, place.node_rank, place.master, wait_seconds)
        if token is None:
            return 0
        return _outcome(job, place, _run_ranks(job, place, log_file, StopRequest(job.run, token), wait_seconds))
    with lease.hold(job.run, wait_seconds) as token:
        try:
            return _train(job, place, log_file, wait_seconds, token)
        except UserError as error:
            if lease.held(job.run, token) or not is_finished(job.run):
                raise
            # Snakemake would remove, after a failure, what the one who took the run over has published.
            log.warning("%s; what another one has trained is there, finished", error)
            return 0


def _train(job: Job, place: Place, log_file: Path | None, wait_seconds: float, token: str) -> int:
    """Train with the run folder's lease; returns the exit status."""
    job = job.with_inputs()
    if job.is_finished():
        log.info("%s: this training is finished", job.run)
        return 0
    lease.check(job.run, token)  # hashing takes a while, in which this machine may have stood still
    # of another training into this folder, of an earlier stop or failure
    for left in ("run.json", "stop", failure.NAME):
        (job.run / left).unlink(missing_ok=True)
    leftovers.set_aside(job)
    job = with_origin(job)
    job.write()
    with followed(job.run, place.track_uri, place.track_experiment, job.layout):
        stop = StopRequest(job.run, token, place.exit_after_minutes)
        code = _run_ranks(job, place, log_file, stop, wait_seconds)
    lease.check(job.run, token)
    return _outcome(job, place, code)


def _outcome(job: Job, place: Place, code: int) -> int:
    """The exit status, from that of srun or torchrun; UserError, saying what to do, if the training failed."""
    run = job.run
    if is_finished(run):
        if code:  # after a failure Snakemake would remove it
            log.warning("%s is trained and published; its processes ended with status %s afterwards", run, code)
        return 0
    if code or failure.has_to_end(run):
        said = failure.digest(run, job.layout.nodes)
        raise UserError(f"training failed {said}; see {run / 'log.txt'}; {_resumes_from(job, place)}")
    return STOPPED


def _resumes_from(job: Job, place: Place) -> str:
    newest = max((path.parent for path in job.checkpoints.glob("step-*/manifest.json")), default=None)
    goes_on = f"goes on from {newest}" if newest else "begins at the start, for no checkpoint was saved"
    again = "this command, started on all nodes again," if place.master else "this command"
    return f"{again} {goes_on}: llmpipe {shlex.join(sys.argv[1:])}"


def _run_ranks(job: Job, place: Place, log_file: Path | None, stop: StopRequest, wait_seconds: float) -> int:
    """Start the ranks and wait for their end; returns the exit status of srun or torchrun."""
    layout = job.layout
    if takes_srun(layout, place):
        return supervise_srun(_srun(layout, place), environment(layout, place, stop.token), stop)
    if place.master and place.node_rank == 0:
        first_node.check_port(place.master)
    with gpus.taken(layout.gpus_per_node if layout.device == "cuda" else 0, wait_seconds), watched(job.run):
        return supervise_torchrun(_torchrun(job, place, log_file), environment(layout, place, stop.token), stop)


def takes_srun(layout: Layout, place: Place) -> bool:
    """Whether srun has to start this command again, on each node of the Slurm job; UserError without such a job."""
    in_job, in_step = "SLURM_JOB_ID" in os.environ, "SLURM_STEP_ID" in os.environ
    if place.master or (layout.nodes == 1 and (in_step or not in_job)):
        return False
    if not in_job:
        raise UserError(
            f"{layout.nodes} nodes take a Slurm job, or on each node this command with --node-rank R --master HOST:PORT"
        )
    return True


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
        "--kill-on-bad-exit=1", "--overlap", "--label", "--export=ALL",
        sys.executable, "-m", "llmpipe", *sys.argv[1:], f"--master={host}:{port}",
    ]  # fmt: skip


def _torchrun(job: Job, place: Place, log_file: Path | None) -> list[str]:
    """The ranks of this node."""
    layout = job.layout
    rendezvous = ["--standalone"]
    if layout.nodes > 1:  # c10d: ranks of a static rendezvous cannot be restarted in place
        rendezvous = [
            f"--nnodes={layout.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={place.master}",
            f"--rdzv-id={job.run.name}",
            f"--rdzv-conf=is_host={int(place.node_rank == 0)},join_timeout={NODES_SECONDS}",
        ]  # fmt: skip
        address = first_node.own_address(place.master) if place.master else None
        rendezvous += [f"--local-addr={address}"] if address else []
    return [
        sys.executable, "-m", "llmpipe.train.agent", str(job.run), str(place.restarts), *rendezvous,
        f"--nproc-per-node={layout.gpus_per_node}", "--signals-to-handle=SIGQUIT",
        "-m", "llmpipe.train", str(job.path), *([str(log_file)] if log_file else []),
    ]  # fmt: skip


def environment(layout: Layout, place: Place, token: str) -> dict[str, str]:
    """What the ranks' processes find in their environment."""
    return os.environ | {
        lease.TOKEN: token,
        "OMP_NUM_THREADS": str(max(1, place.threads // layout.gpus_per_node)),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted gloo ranks call the dead attempt's ports
    }
