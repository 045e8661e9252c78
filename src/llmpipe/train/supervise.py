"""Runs srun or torchrun to its end. Signals become the file RUN/stop, which the ranks look for after each step."""

import logging
import signal
import subprocess
import time
from pathlib import Path

from llmpipe.parallel.processes import die_with_parent
from llmpipe.train import lease

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IDLE_SECONDS = 20.0
"""Without a rank, after which torchrun waits for something; ranks that end, and are started again, take less."""
log = logging.getLogger(__name__)


def ask_to_stop(run: Path, token: str) -> None:
    """Have the ranks save and leave after the step in hand; another trainer that has taken the run over goes on."""
    if lease.held(run, token):
        (run / "stop").touch()


def supervise_srun(argv: list[str], run: Path, variables: dict[str, str], token: str) -> int:
    """Run srun to its end and return its exit status; killed, it would leave its tasks behind, SIGQUIT ends them."""
    return _status(_start(argv, run, variables, token, last_signal=signal.SIGQUIT).wait())


def supervise_torchrun(argv: list[str], run: Path, variables: dict[str, str], token: str) -> int:
    """Run torchrun to its end and return its exit status; 0 if it was asked to stop when no rank was there to hear it.

    It has no ranks while it waits for other nodes, at the start and after one of them has died.
    """
    process = _start(argv, run, variables, token, last_signal=signal.SIGKILL)  # its ranks then end as well
    since, told = time.monotonic(), False
    while True:
        try:
            return _status(process.wait(timeout=1))
        except subprocess.TimeoutExpired:
            pass
        if _has_children(process.pid):
            since, told = time.monotonic(), False
        if time.monotonic() - since < IDLE_SECONDS:
            continue
        if (run / "stop").exists():
            process.kill()
            process.wait()
            return 0
        if not told:
            log.warning("no rank runs on this node: torchrun waits for the other nodes, where there are some")
        told = True


def _start(
    argv: list[str], run: Path, variables: dict[str, str], token: str, last_signal: signal.Signals
) -> "subprocess.Popen[bytes]":
    """Start a command that gets `last_signal` when we die."""

    def shield() -> None:
        """In the child, before it becomes the command."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(last_signal)

    for number in SIGNALS:
        signal.signal(number, lambda *_: ask_to_stop(run, token))
    # In a session of its own, where neither Ctrl-C nor `scancel --full` finds it.
    return subprocess.Popen(argv, env=variables, preexec_fn=shield, start_new_session=True)


def _status(code: int) -> int:
    """An exit status as a shell has it."""
    return code if code >= 0 else 128 - code


def _has_children(pid: int) -> bool:
    """Whether a process of this machine has started others that are there still."""
    try:
        return any(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:  # a thread of it, or it itself, has ended meanwhile
        return True
