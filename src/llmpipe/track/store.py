"""MLflow's store: where it is, and that one process at a time writes a run in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmpipe.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND = "mlflow.experimentKind"  # else the page asks whether it is about agents or about training


def quieten() -> None:
    """No telemetry, no chatter, and an unreachable server is given up after seconds, before MLflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def sqlite_file(uri: str) -> Path | None:
    """The database's file: sqlite:///mlflow.db counts from the current folder, sqlite:////a/mlflow.db is absolute."""
    parts = urlsplit(uri)
    return Path(parts.path[1:]).absolute() if parts.scheme.startswith("sqlite") else None


@contextmanager
def locked(uri: str, folder: Path) -> Iterator[None]:
    """One writer at a time: of an sqlite file, which two that create its tables damage; else of what a folder holds."""
    database = sqlite_file(uri)
    path = database.with_name(f".{database.name}.lock") if database else folder / ".track.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """The experiment's id; a new one beside an sqlite file keeps its artifacts beside that file too."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_file(uri)
        location = str(database.parent / "mlruns") if database else None
        return client.create_experiment(name, location, {KIND: "custom_model_development"})
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} in {uri} was deleted: restore it with `mlflow experiments restore -x"
            f" {experiment.experiment_id}`, or name another with --experiment"
        )
    return experiment.experiment_id
