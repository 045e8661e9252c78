"""What a Snakemake that ends with a failure, or at Ctrl-C, leaves in Slurm's queue."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from llmpipe.programs import ask

RUN_ID = re.compile(r"SLURM run ID: (\S+)")
NOT_ENDING = "PENDING,RUNNING,SUSPENDED,CONFIGURING"
SECONDS = 60


def cancel_left_jobs(logs: Iterable[str]) -> str:
    """Cancel the jobs of a Snakemake, known by its log, that Slurm still has; a line on them, "" if there are none.

    At Ctrl-C Snakemake 9.27 forgets those whose state it is just asking for (RemoteExecutor.cancel, _wait_for_jobs).
    Its Slurm plugin names each job by the id of the run, which it logs.
    """
    names = {name for path in logs for name in RUN_ID.findall(Path(path).read_text(errors="replace"))}
    if not names or not shutil.which("squeue"):
        return ""
    by_name = f"--name={','.join(sorted(names))}"
    try:
        jobs = ask("squeue", "-h", "-o", "%i", "-t", NOT_ENDING, by_name, seconds=SECONDS).stdout.split()
        if jobs:
            ask("scancel", *jobs, seconds=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Slurm's queue may still have jobs of this run: {error}. Look with: squeue {by_name}"
    return f"Cancelled what was left in Slurm's queue: {' '.join(jobs)}" if jobs else ""
