"""python quick_snakemake.py ARGUMENTS: Snakemake that looks after its Slurm jobs every second.

Its Slurm plugin waits 10 s longer after each look at which no job had ended, which no option turns off; and where it
has no answer, it asks again sooner than the shipped profile has it. It hears Ctrl-C also where the tests were started
in a shell's background, whose processes ignore that.
"""

import signal
import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["snakemake", *sys.argv[1:], "--max-status-checks-per-second", "10"]
main()
