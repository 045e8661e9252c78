"""Runs srun or torchrun to its end. Signals become the file RUN/stop, which the ranks look for after each step."""

import logging
import math
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmpipe.parallel.processes import die_with_parent
from llmpipe.train import lease

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IDLE_SECONDS = 20.0
"""Without a rank, after which torchrun waits for something; ranks that end, and are started again, take less."""
log = logging.getLogger(__name__)


def heard() -> list[signal.Signals]:
    """SIGNALS, but for a SIGHUP that is ignored here: that is what nohup is for."""
    return [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, as long as there are no ranks that could save, each of the signals is a KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether the ranks shall save and leave after the step in hand: a signal asks for it, or the clock.

    The signal's handler only notes it, for it may run in the middle of anything; `pass_on` then tells the ranks.
    """

    def __init__(self, run: Path, token: str, after_minutes: float = 0.0):
        """For the ranks of a run folder whose lease has this token; `after_minutes` from now, 0: not by the clock."""
        self.run, self.token = run, token
        self.is_signalled, self.is_passed_on = False, False
        self.deadline = time.monotonic() + after_minutes * 60 if after_minutes else math.inf

    def listen(self) -> None:
        """Take the signals from now on."""
        for number in heard():
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.is_signalled = True

    def pass_on(self) -> None:
        """Make what was asked for the file RUN/stop; another trainer that has taken the run over goes on.

        To be called again and again: where the file system fails, the next call tries again.
        """
        if self.is_passed_on or not (self.is_signalled or time.monotonic() > self.deadline):
            return
        with suppress(OSError):
            if lease.held(self.run, self.token):
                (self.run / "stop").touch()
            self.is_passed_on = True


def supervise_srun(argv: list[str], variables: dict[str, str], stop: StopRequest) -> int:
    """Run srun to its end and return its exit status; killed, it would leave its tasks behind, SIGQUIT ends them."""
    process = _start(argv, variables, stop, last_signal=signal.SIGQUIT)
    while (status := _status_within_a_second(process)) is None:
        stop.pass_on()
    return status


def supervise_torchrun(argv: list[str], variables: dict[str, str], stop: StopRequest) -> int:
    """Run torchrun to its end and return its exit status; 0 if it was asked to stop when no rank was there to hear it.

    It has no ranks while it waits for other nodes, at the start and after one of them has died.
    """
    process = _start(argv, variables, stop, last_signal=signal.SIGKILL)  # its ranks then end as well
    since, told = time.monotonic(), False
    while (status := _status_within_a_second(process)) is None:
        stop.pass_on()
        if _has_children(process.pid):
            since, told = time.monotonic(), False
        if time.monotonic() - since < IDLE_SECONDS:
            continue
        if (stop.run / "stop").exists():
            process.kill()
            process.wait()
            return 0
        if not told:
            log.warning("no rank runs on this node: torchrun waits for the other nodes, where there are some")
        told = True
    return status


def _start(
    argv: list[str], variables: dict[str, str], stop: StopRequest, last_signal: signal.Signals
) -> "subprocess.Popen[bytes]":
    """Start a command that gets `last_signal` when we die."""

    def shield() -> None:
        """In the child, before it becomes the command."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(last_signal)

    stop.listen()
    # In a session of its own, where neither Ctrl-C nor `scancel --full` finds it.
    return subprocess.Popen(argv, env=variables, preexec_fn=shield, start_new_session=True)


def _status_within_a_second(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit status as a shell has it; None for a process that goes on."""
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return None
    return code if code >= 0 else 128 - code


def _has_children(pid: int) -> bool:
    """Whether a process of this machine has started others that are there still."""
    try:
        return any(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:  # a thread of it, or it itself, has ended meanwhile
        return True
