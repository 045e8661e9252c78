"""Other programs that are asked something, as nvidia-smi and squeue: none of them is waited for without limit."""

import subprocess
from contextlib import suppress

KILL_SECONDS = 1


def ask(*command: str, seconds: float, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end; OSError if it cannot be started, TimeoutExpired if it does not end in time."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    out, error = output_of(process, seconds)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def output_of(process: "subprocess.Popen[str]", seconds: float) -> tuple[str, str]:
    """What a process writes until it ends; TimeoutExpired if it does not in time: it is killed then.

    One that waits in a driver, or for a file system, does not end even so, and is left there: subprocess.run would
    wait for it.
    """
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_SECONDS)
        raise
