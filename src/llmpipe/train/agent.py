"""python -m llmpipe.train.agent RUN RESTARTS ARGUMENTS...: torchrun, which tells of a rank that ended without a word.

Such a rank was killed, by the kernel for its memory or by NCCL, say; of several torchrun names the first.
"""

import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from llmpipe.train import failure

PERHAPS = {
    signal.SIGKILL: ", perhaps by the kernel for its memory",
    signal.SIGABRT: ", perhaps by NCCL after timeout_minutes without an answer from another rank",
}


def main(run: Path, restarts: int, arguments: list[str]) -> None:
    """Run torchrun to its end; it raises when ranks have failed once more than they are started again."""
    try:
        torchrun([f"--max-restarts={restarts}", *arguments])
    except ChildFailedError as error:
        rank, ended = error.get_first_failure()
        failure.tell(run, f"ended without a word: {how(ended.exitcode)}", of=(rank, restarts))
        raise


def how(code: int) -> str:
    """A process's end by its exit code, below 0 for a signal."""
    if code >= 0:
        return f"with status {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"killed by signal {-code}"
    return f"killed by {number.name}{PERHAPS.get(number, '')}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
