"""Files mirrored to an sqlite store, read back through MLflow's own client."""

import json
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from run_folders import make_model, make_run

from llmpipe.errors import UserError
from llmpipe.track import mirror
from llmpipe.track.mirror import track
from llmpipe.track.plot import plot_loss


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store's tables, made once: MLflow takes seconds for them."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def uri(empty_store: bytes, tmp_path: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("llmpipe")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def points(tmp_path: Path) -> list[tuple]:
    """Every metric point, as the database has it."""
    connection = sqlite3.connect(tmp_path / "mlflow.db")
    try:
        return sorted(connection.execute("select run_uuid, key, step, value, timestamp from metrics").fetchall())
    finally:
        connection.close()


def test_a_run_is_mirrored(uri: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "r", steps=5)
    track(folder, uri, "llmpipe", tmp_path / "out" / "tracked.json")
    (run,) = runs(uri)
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert run.data.params["recipe.lr"] == "0.001" and run.data.tags["exit_reason"] == "finished"
    assert run.data.metrics["evaluate.perplexity.perplexity.after"] == 8.0
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(i, 5 / i) for i in range(1, 6)]
    assert [point.timestamp - run.info.start_time for point in history] == [2000, 4000, 6000, 8000, 10000]
    told = json.loads((tmp_path / "out" / "tracked.json").read_text())
    assert told["runs"][0]["mlflow_run"] == run.info.run_id and told["uri"] == uri


def test_artifacts_lie_beside_the_store(uri: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "r")
    track(folder, uri, "llmpipe", tmp_path / "tracked.json")
    (run,) = runs(uri)
    there = tmp_path / "mlruns" / run.info.run_id / "artifacts"
    assert (there / "evaluate" / "table.json").read_bytes() == (folder / "evaluate" / "table.json").read_bytes()
    assert (there / "config" / "recipes" / "same.yaml").is_file() and (there / "weights" / "manifest.json").is_file()
    assert (there / "loss.svg").read_bytes() == (tmp_path / "loss.svg").read_bytes()
    assert b"<svg" in (there / "loss.svg").read_bytes()


def test_tracking_again_changes_nothing(uri: str, tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "m")
    make_run(tmp_path / "runs" / "r", steps=2500)
    track(tmp_path, uri, "llmpipe")
    before = points(tmp_path), [(run.info.run_id, run.info.end_time, run.data.tags) for run in runs(uri)]
    assert len(before[0]) == 2 * 2500 + 3 + 2 + 2 and len(before[1]) == 2
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*")}
    track(tmp_path, uri, "llmpipe")
    assert (points(tmp_path), [(run.info.run_id, run.info.end_time, run.data.tags) for run in runs(uri)]) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*")} == files


def test_a_later_stage_joins_the_same_run(uri: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    track(folder, uri, "llmpipe")
    before = points(tmp_path)
    (folder / "export").mkdir()
    (folder / "export" / "check.json").write_text("{}")
    table = folder / "evaluate" / "table.json"
    table.write_text(table.read_text().replace("8.0", "7.5"))
    track(folder, uri, "llmpipe")
    (run,) = runs(uri)
    assert run.data.metrics["evaluate.perplexity.perplexity.after"] == 7.5
    assert [point[3] for point in points(tmp_path) if point not in before] == [7.5]
    assert (tmp_path / "mlruns" / run.info.run_id / "artifacts" / "export" / "check.json").is_file()


@pytest.mark.parametrize("changes", [{"weights": b"other"}, {"recipe": {"lr": 0.002}}], ids=["weights", "recipe"])
def test_a_retrained_run_is_a_new_run(uri: str, tmp_path: Path, changes: dict) -> None:
    for given in ({}, changes):
        track(make_run(tmp_path / "r", **given), uri, "llmpipe")
    assert len({run.info.run_id for run in runs(uri)}) == 2


def test_a_broken_connection_is_mended(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk of the curves fails; tracking again adds what is missing, once."""
    folder, sent = make_run(tmp_path / "r", steps=1500), []
    log_batch = MlflowClient.log_batch

    def breaks(self, run_id, metrics=(), **rest):
        sent.append(len(metrics))
        if sum(sent) > 1000:
            raise ConnectionError("the line is cut")
        return log_batch(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", breaks)
    with pytest.raises(UserError, match="the line is cut"):
        track(folder, uri, "llmpipe", tmp_path / "tracked.json")
    assert len(points(tmp_path)) == 1000 and not (tmp_path / "tracked.json").exists()
    monkeypatch.undo()
    track(folder, uri, "llmpipe")
    curves = [point[:4] for point in points(tmp_path) if point[1] in ("loss", "lr")]
    assert len(curves) == len(set(curves)) == 3000 and len(runs(uri)) == 1


def test_a_failed_run(uri: str, tmp_path: Path) -> None:
    track(make_run(tmp_path / "r", exit_reason="diverged"), uri, "llmpipe")
    assert runs(uri)[0].info.status == "FAILED"


def test_an_unreachable_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine: nobody listens. The plot is there, the file that says that all is done is not."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = make_run(tmp_path / "r")
    with pytest.raises(UserError) as raised:
        track(folder, "http://127.0.0.1:9", "llmpipe", tmp_path / "out" / "tracked.json")
    assert str(raised.value).startswith("the tracking store http://127.0.0.1:9 cannot be written: ")
    assert str(raised.value).endswith(
        f". Only the copy is missing, the files in {folder} are whole: start the store or name another with --uri, then"
        " track again"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss.svg"]


def test_a_deleted_experiment(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    number = client.create_experiment("llmpipe")
    client.delete_experiment(number)
    with pytest.raises(UserError) as raised:
        track(make_run(tmp_path / "r"), uri, "llmpipe")
    assert str(raised.value) == (
        f"the MLflow experiment 'llmpipe' in {uri} was deleted: restore it with `mlflow experiments restore -x"
        f" {number}`, or name another with --experiment"
    )


def test_where_an_sqlite_store_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mirror.sqlite_file("sqlite:///mlflow.db") == tmp_path / "mlflow.db"
    assert mirror.sqlite_file("sqlite:////data/mlflow.db") == Path("/data/mlflow.db")
    assert mirror.sqlite_file("http://host:5000") is None


def test_the_plot_shows_held_out_losses_and_bears_skipped_steps(tmp_path: Path) -> None:
    curves = [{"step": 1, "loss": 5.0, "lr": 1e-3}, {"step": 2, "loss": None, "lr": 1e-3, "eval_loss": 4.5}]
    plot_loss(curves, "title", tmp_path / "loss.svg")
    assert "<!-- held-out loss -->" in (tmp_path / "loss.svg").read_text()
    plot_loss(curves[:1], "title", tmp_path / "loss.svg")
    assert "held-out" not in (tmp_path / "loss.svg").read_text()
