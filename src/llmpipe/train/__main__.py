"""python -m llmpipe.train RUN/job.json [LOG]: one rank of a training, as torchrun starts it for `llmpipe finetune`.

Exit status 0: trained, or stopped as asked and saved; the launcher tells which by RUN/run.json.
"""

import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.parallel.processes import BACKENDS, die_with_parent
from llmpipe.progress import configure_logging
from llmpipe.train.job import read_job
from llmpipe.train.loop import train

TIMEOUT = timedelta(minutes=10)
log = logging.getLogger("llmpipe.train")


def main() -> None:
    die_with_parent(signal.SIGKILL)  # torchrun, when it is killed, cannot end its ranks
    job = read_job(Path(sys.argv[1]))
    # The log in the run folder outlives Snakemake's, which each attempt empties. What ended a rank stands there too.
    configure_logging(job.run / "log.txt", *map(Path, sys.argv[2:]))
    if os.environ["RANK"] != "0":
        logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(BACKENDS[job.layout.device], timeout=TIMEOUT)
    try:
        train(job)
    except UserError as error:
        log.error("%s", error)
        sys.exit(1)
    except Exception:
        log.exception("rank %s failed", os.environ["RANK"])
        sys.exit(1)
    dist.barrier()  # nobody leaves before rank 0 has published
    dist.destroy_process_group()


main()
