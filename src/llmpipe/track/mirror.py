"""The files of finished stages, mirrored to MLflow (design decision 17): files are the truth, this may be lost.

An MLflow run is found again by the tag `llmpipe.identity`; the tag `sha256 NAME` of each artifact says which bytes
are already there. So tracking the same files twice writes nothing, and a later stage's files join the same run.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmpipe.errors import UserError
from llmpipe.files import sha256, write_json
from llmpipe.progress import progress
from llmpipe.track.plot import plot_loss
from llmpipe.track.subject import Subject, is_number, subjects

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CHUNK_METRICS = 1000  # MLflow's limit for one request
CHUNK_PARAMS = 100
IDENTITY = "llmpipe.identity"
log = logging.getLogger(__name__)


def track(results: Path, uri: str, experiment: str, output: Path | None = None) -> None:
    """Mirror what is finished in `results`; `output` is written last and says what was mirrored where."""
    found = subjects(results)
    quieten()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with tempfile.TemporaryDirectory() as folder:
        for subject in found:
            beside = output.parent if output and len(found) == 1 else Path(folder) / subject.identity
            add_plot(subject, beside)
        try:
            mirrored = mirror_all(found, uri, experiment)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"the tracking store {uri} cannot be written: {str(error).splitlines()[0]}. Only the copy is missing,"
                f" the files in {results} are whole: start the store or name another with --uri, then track again"
            ) from error
    if output:
        write_json(output, {"uri": uri, "experiment": experiment, "runs": mirrored})


def quieten() -> None:
    """No telemetry, no chatter, and an unreachable server is given up after seconds, before MLflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def add_plot(subject: Subject, folder: Path) -> None:
    if subject.curves:
        plot_loss(subject.curves, f"{subject.name}: training loss", folder / "loss.svg")
        subject.artifacts["loss.svg"] = folder / "loss.svg"


def mirror_all(found: list[Subject], uri: str, experiment: str) -> list[dict[str, str]]:
    from mlflow import MlflowClient

    with locked(uri):
        client = MlflowClient(uri)
        experiment_id = open_experiment(client, uri, experiment)
        mirrored = []
        with progress("track", len(found), "run") as shown:
            for subject in found:
                run_id = mirror(client, experiment_id, subject)
                mirrored.append(
                    {"name": subject.name, "kind": subject.kind, "digest": subject.digest, "mlflow_run": run_id}
                )
                shown.add(1, subject.name)
        return mirrored


def sqlite_file(uri: str) -> Path | None:
    """The database's file: sqlite:///mlflow.db counts from the current folder, sqlite:////a/mlflow.db is absolute."""
    parts = urlsplit(uri)
    return Path(parts.path[1:]).absolute() if parts.scheme.startswith("sqlite") else None


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """One writer at a time on an sqlite file: two that create its tables at once damage it."""
    database = sqlite_file(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """The experiment's id; a new one beside an sqlite file keeps its artifacts beside that file too."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_file(uri)
        return client.create_experiment(name, str(database.parent / "mlruns") if database else None)
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} in {uri} was deleted: restore it with `mlflow experiments restore -x"
            f" {experiment.experiment_id}`, or name another with --experiment"
        )
    return experiment.experiment_id


def mirror(client: "MlflowClient", experiment_id: str, subject: Subject) -> str:
    """Bring one subject's MLflow run up to date; returns its id."""
    run = find(client, experiment_id, subject)
    run_id = run.info.run_id
    log_missing_params(client, run, subject.params)
    log_missing_curves(client, run, subject)
    log_changed_metrics(client, run, subject)
    for name, path in subject.artifacts.items():
        digest, tag = sha256(path), f"sha256 {name}"
        if run.data.tags.get(tag) != digest:
            parent = str(Path(name).parent)
            client.log_artifact(run_id, str(path), None if parent == "." else parent)
            client.set_tag(run_id, tag, digest)
    for key, value in subject.tags.items():
        if run.data.tags.get(key) != value:
            client.set_tag(run_id, key, value)
    finished = subject.tags.get("exit_reason", "finished") == "finished"
    if run.info.status == "RUNNING":
        client.set_terminated(run_id, "FINISHED" if finished else "FAILED", subject.end_ms)
    log.info("%s %s: MLflow run %s", subject.kind, subject.name, run_id)
    return run_id


def find(client: "MlflowClient", experiment_id: str, subject: Subject) -> "Run":
    """The MLflow run of these weights, made if there is none."""
    same = client.search_runs([experiment_id], f"tags.`{IDENTITY}` = '{subject.identity}'")
    if same:
        return same[0]
    tags = {IDENTITY: subject.identity, "llmpipe.kind": subject.kind, "digest": subject.digest}
    return client.create_run(experiment_id, subject.start_ms, tags, subject.name)


def log_missing_params(client: "MlflowClient", run: "Run", params: dict[str, str]) -> None:
    from mlflow.entities import Param

    missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    for start in range(0, len(missing), CHUNK_PARAMS):
        client.log_batch(run.info.run_id, params=missing[start : start + CHUNK_PARAMS])


def log_missing_curves(client: "MlflowClient", run: "Run", subject: Subject) -> None:
    """The points of steps that the store lacks: all of them at first, the rest after a broken connection."""
    if run.data.tags.get("sha256 metrics.jsonl") == sha256_of(subject, "metrics.jsonl"):
        return
    from mlflow.entities import Metric

    there: dict[str, set[int]] = {}
    points: list[Any] = []
    now_ms = float(subject.start_ms)
    for line in subject.curves:
        now_ms += 1000 * (line.get("seconds") or 0)
        for key, value in line.items():
            if key in ("step", "seconds") or not is_number(value):
                continue
            if key not in there:
                there[key] = logged_steps(client, run, key)
            if line["step"] not in there[key]:
                points.append(Metric(key, value, int(now_ms), line["step"]))
    for start in range(0, len(points), CHUNK_METRICS):
        client.log_batch(run.info.run_id, metrics=points[start : start + CHUNK_METRICS])


def logged_steps(client: "MlflowClient", run: "Run", key: str) -> set[int]:
    if key not in run.data.metrics:
        return set()
    return {point.step for point in client.get_metric_history(run.info.run_id, key)}


def log_changed_metrics(client: "MlflowClient", run: "Run", subject: Subject) -> None:
    """Numbers of the whole run; of two points of a step MLflow shows the one with the later time."""
    from mlflow.entities import Metric

    there, now_ms = run.data.metrics, int(time.time() * 1000)
    changed = [Metric(key, value, now_ms, 0) for key, value in subject.metrics.items() if there.get(key) != value]
    for start in range(0, len(changed), CHUNK_METRICS):
        client.log_batch(run.info.run_id, metrics=changed[start : start + CHUNK_METRICS])


def sha256_of(subject: Subject, name: str) -> str | None:
    path = subject.artifacts.get(name)
    return sha256(path) if path else None
