"""The process that mirrors a training to MLflow while it goes on: `llmpipe track RUN --follow`, beside it.

It reads the files that the training writes, at the lowest priority, and has nothing that the training waits for: a
store that is slow, or down, keeps curves from being live, and `llmpipe track` afterwards brings what is missing.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpipe.layout import Layout
from llmpipe.parallel.processes import die_with_parent

log = logging.getLogger(__name__)


@contextmanager
def followed(run: Path, uri: str | None, experiment: str, layout: Layout) -> Iterator[None]:
    """Over a training: the follower, where a store is named and may be written from here."""
    if not uri or not _may_write(uri, layout):
        yield
        return
    command = [sys.executable, "-m", "llmpipe", "track", str(run), "--uri", uri, "--experiment", experiment, "--follow"]
    follower = subprocess.Popen(
        [*command, "--log", str(run / "track.log")], preexec_fn=_stand_back, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log.info("live in MLflow: %s, experiment %s; log in %s", uri, experiment, run / "track.log")
    try:
        yield
    finally:
        follower.terminate()  # it looks once more, and ends by itself; nobody waits for it


def _may_write(uri: str, layout: Layout) -> bool:
    """sqlite is written on one machine: on a file system that nodes share, several writers corrupt it."""
    is_cluster = layout.nodes > 1 or "SLURM_JOB_ID" in os.environ
    return not (uri.startswith("sqlite") and is_cluster)


def _stand_back() -> None:
    """In the child, before it becomes the command: the lowest priority, and an end when the launcher dies."""
    os.nice(19)
    die_with_parent(signal.SIGTERM)
