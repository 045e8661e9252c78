"""The cluster of these tests: nothing of it outlives them, however they end."""

import subprocess
import sys
from pathlib import Path

from private_slurm import PrivateSlurm, wait_for

TESTS = """
import time
from private_slurm import private_slurm

with private_slurm() as slurm:
    print(slurm.folder, flush=True)
    time.sleep(600)
"""


def test_killed_tests_leave_no_cluster_and_no_jobs(slurm: PrivateSlurm) -> None:
    """Another one beside it, which lives on."""
    command = [sys.executable, "-c", TESTS]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        other = PrivateSlurm(Path(tests.stdout.readline().strip()))
        other.call("sbatch", "--output=/dev/null", "--wrap=sleep 600")
        wait_for(lambda: "RUNNING" in [state for _, state, *_ in other.jobs()], "a job")
        tests.kill()
    wait_for(lambda: not other.folder.exists(), "the end of the cluster")
    assert other.processes() == []
    assert slurm.call("sinfo", "-h")
