"""`llmpipe track RUN --follow` beside a test, and what it has brought."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient

PATIENCE = 240  # seconds, on a busy machine


def until(true: Callable[[], object], what: str) -> None:
    for _ in range(10 * PATIENCE):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within {PATIENCE} s: {what}")


def losses(uri: str) -> list[int]:
    """The steps of the one training's loss, in the order that the store has them."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("llmpipe")
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], "tags.`llmpipe.kind` = 'run'")
    assert len(found) < 2, "the training stands twice in the store"
    return [point.step for run in found for point in client.get_metric_history(run.info.run_id, "loss/train")]


@contextmanager
def following(run: Path, uri: str) -> Iterator[subprocess.Popen]:
    """`llmpipe track RUN --follow`, ended with the block if it has not ended before."""
    command = [sys.executable, "-m", "llmpipe", "track", str(run), "--uri", uri, "--follow", "--log", f"{run}.log"]
    process = subprocess.Popen(command, env=os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()
