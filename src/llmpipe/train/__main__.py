"""python -m llmpipe.train RUN/job.json [LOG]: one rank of a training, as torchrun starts it for `llmpipe finetune`.

Exit status 0: trained, or stopped as asked and saved, or failed for a reason that another attempt would meet again;
the launcher tells which by RUN/run.json and RUN/failure.json.
"""

import gc
import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.parallel.meeting import Store, meet, silent
from llmpipe.parallel.processes import BACKENDS, die_with_parent
from llmpipe.progress import configure_logging
from llmpipe.train import failure, lease
from llmpipe.train.job import Job, read_job
from llmpipe.train.loop import train

log = logging.getLogger("llmpipe.train")


def main() -> None:
    gc.freeze()  # what torch is made of is not looked through for garbage: not in the training, not at the end
    die_with_parent(signal.SIGKILL)  # torchrun, when it is killed, cannot end its ranks
    job = read_job(Path(sys.argv[1]))
    if failure.has_to_end(job.run) or not lease.held(job.run):  # the launcher says why
        return
    # The log in the run folder outlives Snakemake's, which each attempt empties. What ended a rank stands there too.
    configure_logging(job.run / "log.txt", *map(Path, sys.argv[2:]))
    if os.environ["RANK"] != "0":
        logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store = None
    try:
        store = meet(BACKENDS[job.layout.device], timedelta(minutes=job.timeout_minutes))
        if os.environ["RANK"] == "0":
            failure.forget(job.run)
        dist.barrier()  # no rank of this attempt fails, and tells it, before
        train(job)
        dist.barrier()  # nobody leaves before rank 0 has published
        dist.destroy_process_group()
    except UserError as error:
        log.error("%s", error)
        failure.tell(job.run, str(error), final=store is not None)
        if store is None:
            _leave_at_once()
    except Exception as error:
        log.exception("rank %s failed", os.environ["RANK"])
        _tell(job, store, error)
        _leave_at_once()


def _leave_at_once() -> None:
    """Without asking groups and threads to end, which may wait for a rank that hangs."""
    logging.shutdown()
    os._exit(1)


def _tell(job: Job, store: Store | None, error: Exception) -> None:
    """For the launcher: what went wrong here, and where another rank is at fault, which."""
    others = silent(store) if store and _is_of_others(error) else ""
    if others:
        log.error("%s did not answer", others)
    lines = str(error).splitlines() or [""]
    failure.tell(job.run, f"{type(error).__name__}: {lines[0]}", others)


def _is_of_others(error: Exception) -> bool:
    """Whether another rank did not answer: NCCL and the store have errors of their own, gloo names its files."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


main()
