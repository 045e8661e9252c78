"""Files mirrored to an sqlite store, read back through MLflow's own client."""

import json
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Run
from run_folders import ORIGIN, START, lines_of, make_corpus, make_export, make_live, make_model, make_run, step_line

from llmpipe.errors import UserError
from llmpipe.track.mirror import track
from llmpipe.track.plot import plot_loss
from llmpipe.track.store import sqlite_file

PARENT = "mlflow.parentRunId"


def all_runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("llmpipe")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def trainings(uri: str) -> list[Run]:
    return [run for run in all_runs(uri) if PARENT not in run.data.tags]


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
    (run,) = trainings(uri)
    assert (run.info.run_name, run.info.status, run.info.start_time) == ("r", "FINISHED", 1000 * START)
    assert run.data.params["recipe.lr"] == "0.001" and run.data.tags["exit_reason"] == "finished"
    assert run.data.metrics["tasks/perplexity/perplexity_after"] == 8.0
    client = MlflowClient(uri)
    history = client.get_metric_history(run.info.run_id, "loss/train")
    expected = [(i, 5 / i, 1000 * (START + i)) for i in range(1, 6)]
    assert [(point.step, point.value, point.timestamp) for point in history] == expected
    busy = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in busy] == [(1, 90.0), (2, 91.0)]
    assert "optimizer/skipped_steps" not in run.data.metrics  # a chart of zeros says nothing
    assert [(used.dataset.name, used.dataset.digest) for used in run.inputs.dataset_inputs] == [("c", "dd")]
    told = json.loads((tmp_path / "out" / "tracked.json").read_text())
    assert told["runs"][0]["mlflow_run"] == run.info.run_id and told["uri"] == uri


def test_trainings_have_colors_of_their_own(uri: str, tmp_path: Path) -> None:
    """One after the other, by processes of their own or by one, which knows no run that it has not made."""
    for number in range(4):
        made = make_run(tmp_path / "runs" / f"r{number}", origin=ORIGIN | {"training": str(number)})
        if number < 2:
            track(made, uri, "llmpipe")
    track(tmp_path, uri, "llmpipe")
    assert len({run.data.tags["mlflow.runColor"] for run in trainings(uri)}) == 4


def test_nodes_that_are_several_have_sections_of_their_own(uri: str, tmp_path: Path) -> None:
    track(make_run(tmp_path / "r", layout={"nodes": 2, "gpus_per_node": 2, "tp": 2, "device": "cpu"}), uri, "llmpipe")
    (run,) = trainings(uri)
    assert run.data.metrics["system/node7/cpu_utilization_percentage"] == 91.0


def test_stages_are_child_runs(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("results/models/m"))
    make_corpus(Path("corpora/c"))
    make_export(make_run(Path("results/runs/r")))
    track(Path("results/runs/r"), uri, "llmpipe")
    (parent,) = trainings(uri)
    children = {run.info.run_name: run for run in all_runs(uri) if run.data.tags.get(PARENT) == parent.info.run_id}
    assert children.keys() == {"tokenize c", "convert", "shard", "verify", "finetune", "evaluate", "export"}
    assert children["verify"].data.metrics["verify/max_logit"] == 1e-6
    assert {run.info.status for run in children.values()} == {"FINISHED"}


def test_the_export_is_a_logged_model_without_its_weights(uri: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "r.v2")
    export = make_export(folder)
    track(folder, uri, "llmpipe")
    track(folder, uri, "llmpipe")
    client, (run,) = MlflowClient(uri), trainings(uri)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.name, model.status, model.source_run_id) == ("r_v2", LoggedModelStatus.READY, run.info.run_id)
    assert model.tags["export.path"] == str(export) and model.tags["mlflow.model.isExternal"] == "true"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert {metric.key: metric.value for metric in model.metrics} == {"tasks/perplexity/perplexity_after": 8.0}
    files = {path.name for path in Path(model.artifact_location).rglob("*") if path.is_file()}
    assert files == {"README.md", "check.json", "manifest.json", "MLmodel"}
    assert not [*(tmp_path / "mlruns").rglob("*.safetensors")]


def test_a_logged_model_that_was_cut_off_is_finished(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "r")
    make_export(folder)

    def breaks(*_: object) -> None:
        raise ConnectionError("the line is cut")

    monkeypatch.setattr(MlflowClient, "finalize_logged_model", breaks)
    with pytest.raises(UserError, match="the line is cut"):
        track(folder, uri, "llmpipe")
    monkeypatch.undo()
    track(folder, uri, "llmpipe")
    (run,) = trainings(uri)
    (model,) = MlflowClient(uri).search_logged_models([run.info.experiment_id])
    assert model.status == LoggedModelStatus.READY and len(run.outputs.model_outputs) == 1


def test_artifacts_lie_beside_the_store(uri: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "r")
    track(folder, uri, "llmpipe", tmp_path / "tracked.json")
    (run,) = trainings(uri)
    there = tmp_path / "mlruns" / run.info.run_id / "artifacts"
    assert (there / "evaluate" / "table.json").read_bytes() == (folder / "evaluate" / "table.json").read_bytes()
    assert (there / "config" / "recipes" / "same.yaml").is_file() and (there / "weights" / "manifest.json").is_file()
    assert (there / "loss.svg").read_bytes() == (tmp_path / "loss.svg").read_bytes()
    assert b"<svg" in (there / "loss.svg").read_bytes()


def test_tracking_again_changes_nothing(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "models" / "m")
    make_run(tmp_path / "runs" / "r", steps=2500)
    track(tmp_path, uri, "llmpipe")
    before = points(tmp_path), [(run.info.run_id, run.info.end_time, run.data.tags) for run in all_runs(uri)]
    curves = [point[:3] for point in before[0] if point[1] in ("loss/train", "optimizer/learning_rate")]
    of_one_run = {key: sum(point[1] == key for point in before[0]) for _, key, _ in curves}
    assert of_one_run == {"loss/train": 2501, "optimizer/learning_rate": 2501}  # finetune's child has the last ones
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*")}
    monkeypatch.setattr(MlflowClient, "log_batch", None)  # nothing is sent
    monkeypatch.setattr("llmpipe.track.writer.sha256", None)  # no file is read to see that it is the same
    track(tmp_path, uri, "llmpipe")
    after = points(tmp_path), [(run.info.run_id, run.info.end_time, run.data.tags) for run in all_runs(uri)]
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*")} == files


def test_a_later_stage_joins_the_same_run(uri: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    track(folder, uri, "llmpipe")
    before = points(tmp_path)
    make_export(folder)
    table = folder / "evaluate" / "table.json"
    table.write_text(table.read_text().replace("8.0", "8.5"))
    track(folder, uri, "llmpipe")
    (run,) = trainings(uri)
    assert run.data.metrics["tasks/perplexity/perplexity_after"] == 8.5
    assert {point[3] for point in points(tmp_path) if point not in before and "perplexity" in point[1]} == {8.5}
    assert (tmp_path / "mlruns" / run.info.run_id / "artifacts" / "export" / "check.json").is_file()


def test_a_training_and_its_end_are_one_run(uri: str, tmp_path: Path) -> None:
    """Steps that a resumed training takes again stand once, as they were seen first."""
    folder = make_live(tmp_path / "r", steps=9)
    track(folder, uri, "llmpipe")
    (run,) = trainings(uri)
    assert run.info.status == "RUNNING"
    resumed = [step_line(step, loss=1.0) for step in (7, 8)]
    (folder / "live.jsonl").write_text(lines_of(6) + "".join(json.dumps(line) + "\n" for line in resumed))
    track(folder, uri, "llmpipe")
    track(make_run(folder, steps=12), uri, "llmpipe")
    (ended,) = trainings(uri)
    assert (ended.info.run_id, ended.info.status) == (run.info.run_id, "FINISHED")
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "loss/train")
    assert [(point.step, point.value) for point in history] == [(i, 5 / i) for i in range(1, 13)]


def test_a_training_that_goes_on_after_a_failure_is_running_again(uri: str, tmp_path: Path) -> None:
    folder = make_live(tmp_path / "r")
    failure = folder / "failure.json"
    failure.write_text(json.dumps({"attempt": 0, "final": True, "error": "no room"}))
    track(folder, uri, "llmpipe")
    assert trainings(uri)[0].info.status == "FAILED"
    failure.unlink()
    track(folder, uri, "llmpipe")
    assert trainings(uri)[0].info.status == "RUNNING"


def test_another_training_is_a_new_run(uri: str, tmp_path: Path) -> None:
    for training in ("1", "2"):
        track(make_run(tmp_path / "r", origin={"training": training}), uri, "llmpipe")
    assert len({run.info.run_id for run in trainings(uri)}) == 2


def test_what_a_resumed_run_has_otherwise_is_a_tag(uri: str, tmp_path: Path) -> None:
    track(make_run(tmp_path / "r"), uri, "llmpipe")
    track(make_run(tmp_path / "r", layout={"tp": 4}), uri, "llmpipe")
    (run,) = trainings(uri)
    assert (run.data.params["layout.tp"], run.data.tags["now.layout.tp"]) == ("2", "4")


def test_a_broken_connection_is_mended(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of the curves arrives, but its answer is lost: tracking again sends it again, and it stands once."""
    folder = make_run(tmp_path / "r", steps=1500)
    log_batch = MlflowClient.log_batch

    def breaks(self, run_id, metrics=(), tags=(), **rest):
        log_batch(self, run_id, metrics=metrics, **rest)
        if len(metrics) > 100:
            raise ConnectionError("the line is cut")
        return log_batch(self, run_id, tags=tags) if tags else None

    monkeypatch.setattr(MlflowClient, "log_batch", breaks)
    with pytest.raises(UserError, match="the line is cut"):
        track(folder, uri, "llmpipe", tmp_path / "tracked.json")
    assert 100 < len(points(tmp_path)) < 1000 and not (tmp_path / "tracked.json").exists()
    monkeypatch.undo()
    track(folder, uri, "llmpipe")
    (run,) = trainings(uri)
    curves = [
        point[1:4]
        for point in points(tmp_path)
        if point[0] == run.info.run_id and point[1] in ("loss/train", "optimizer/learning_rate")
    ]
    assert len(curves) == len(set(curves)) == 3000


def test_a_failed_run(uri: str, tmp_path: Path) -> None:
    track(make_run(tmp_path / "r", exit_reason="diverged"), uri, "llmpipe")
    assert trainings(uri)[0].info.status == "FAILED"


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_file_of_the_run_that_cannot_be_read(name: str, uri: str, tmp_path: Path) -> None:
    """The kernel's own input/output error: address 0 of a process holds nothing."""
    folder = make_run(tmp_path / "r")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"^.*/r.* cannot be read: Input/output error; mend that, then track again$"):
        track(folder, uri, "llmpipe")


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
    assert sqlite_file("sqlite:///mlflow.db") == tmp_path / "mlflow.db"
    assert sqlite_file("sqlite:////data/mlflow.db") == Path("/data/mlflow.db")
    assert sqlite_file("http://host:5000") is None


def test_the_plot_shows_held_out_losses_and_bears_skipped_steps(tmp_path: Path) -> None:
    curves = [{"step": 1, "loss": 5.0, "lr": 1e-3}, {"step": 2, "loss": None, "lr": 1e-3, "eval_loss": 4.5}]
    plot_loss(curves, "title", tmp_path / "loss.svg")
    assert "<!-- held-out loss -->" in (tmp_path / "loss.svg").read_text()
    plot_loss(curves[:1], "title", tmp_path / "loss.svg")
    assert "held-out" not in (tmp_path / "loss.svg").read_text()
