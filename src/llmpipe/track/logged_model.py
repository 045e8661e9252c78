"""The exported model as an MLflow logged model: its card, its check and where its files are, never its weights."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe.track.subject import Subject, metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MADE_BY = ("mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit")
EXTERNAL = "mlflow.model.isExternal"  # MLflow's own mark of a model whose files lie elsewhere


def log_model(client: "MlflowClient", experiment_id: str, run_id: str, run: Subject, export: Subject) -> None:
    """Make the run's logged model, or finish one that was cut off: each step of it may be done twice."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    model = _find_or_make(client, experiment_id, run_id, run, export)
    for path in export.artifacts.values():
        client.log_model_artifact(model.model_id, str(path))
    _log_spec(client, model)
    _log_measures(client, run_id, model, run)
    if model.status != LoggedModelStatus.READY:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])


def _find_or_make(
    client: "MlflowClient", experiment_id: str, run_id: str, run: Subject, export: Subject
) -> "LoggedModel":
    condition = f"source_run_id = '{run_id}' AND tags.`export.digest` = '{export.digest}'"
    for model in client.search_logged_models([experiment_id], condition):
        return model
    told = {key: run.tags[key] for key in MADE_BY if key in run.tags}
    tags = told | {
        EXTERNAL: "true",
        "export.path": str(run.export),
        "export.digest": export.digest,
        "weights.digest": run.digest,
        "mlflow.note.content": f"The files are in `{run.export}`, not in MLflow.",
    }
    name = metric_name(run.name).replace(".", "_").replace("/", "_").replace(":", "_")
    return client.create_logged_model(experiment_id, name, run_id, tags, run.params, model_type="llmpipe export")


def _log_spec(client: "MlflowClient", model: "LoggedModel") -> None:
    """The file MLmodel, which the model registry asks for."""
    from mlflow.models.utils import get_external_mlflow_model_spec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "MLmodel"
        get_external_mlflow_model_spec(model).save(str(path))
        client.log_model_artifact(model.model_id, str(path))


def _log_measures(client: "MlflowClient", run_id: str, model: "LoggedModel", run: Subject) -> None:
    """The evaluation of the model itself, for the columns of the page of models."""
    from mlflow.entities import Metric

    metrics = [
        Metric(key, value, run.end_ms, 0, model_id=model.model_id, run_id=run_id)
        for key, value in run.metrics.items()
        if key.endswith("_after")
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
