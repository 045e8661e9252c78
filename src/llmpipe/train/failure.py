"""What ended an attempt: the file RUN/failure.json, by the rank that failed first, for the launcher to tell.

    {"attempt": 0, "final": false, "rank": 3, "host": "node7", "error": "...", "silent": "rank 2 on node 0 (node7)"}

After a `final` one, what the user has to mend, ranks that are started again leave at once.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from llmpipe.files import write_json
from llmpipe.train import lease

NAME = "failure.json"


def tell(run: Path, error: str, silent: str = "", final: bool = False, of: tuple[int, int] | None = None) -> None:
    """Write what ended this rank, unless another one of this attempt was first, or another trainer has the run.

    of: the rank and the attempt that it is told of, where it is not this process.
    """
    if not lease.held(run):
        return
    rank, attempt = of or (int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    first = read(run)
    if first and (first["attempt"] >= attempt and first["final"] >= final):
        return
    place = {"rank": rank, "host": socket.gethostname()}
    write_json(run / NAME, {"attempt": attempt, "final": final, **place, "error": error, "silent": silent})


def read(run: Path) -> dict[str, Any] | None:
    """What was told; None where nothing was."""
    try:
        return json.loads((run / NAME).read_text())
    except (OSError, ValueError):
        return None


def forget(run: Path) -> None:
    """What ended an earlier attempt is over, for all ranks of another one have met; the log still has it."""
    if lease.held(run):
        (run / NAME).unlink(missing_ok=True)


def has_to_end(run: Path) -> bool:
    """Whether starting ranks again would be of no use."""
    told = read(run)
    return bool(told and told["final"])


def digest(run: Path, nodes: int = 1) -> str:
    """What the launcher says: which rank failed first, where, why, after which step."""
    told, step = read(run), _last_step(run)
    if not told:
        absent = f", or not all of the {nodes} nodes were there" if nodes > 1 else ""
        return (
            f"after step {step}: a rank ended without a word (killed, perhaps for its memory, or by NCCL after"
            f" timeout_minutes without an answer from another rank){absent}"
        )
    said = f"rank {told['rank']} on {told['host']}: {told['error']}"
    if told["silent"]:
        said = f"{told['silent']} did not answer and hangs or is dead; then {said}"
    return f"after step {step}: {said}"


def _last_step(run: Path) -> int:
    """The last whole line of the metrics."""
    try:
        lines = (run / "live.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("}")), 0)
