"""A real `mlflow server`, killed and started again while a training goes on, or late: nothing is missing or doubled."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from followers import PATIENCE, following, losses, until
from mlflow import MlflowClient
from run_folders import lines_of, make_export, make_live, make_run
from tracking_server import Server, late

from llmpipe.layout import Layout
from llmpipe.track import follower
from llmpipe.track.mirror import track


@pytest.fixture
def server(tmp_path: Path, empty_store: bytes) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_store)
    made = Server(folder)
    made.start()
    yield made
    made.kill()


def test_killed_and_started_again(server: Server, tmp_path: Path) -> None:
    run = make_live(tmp_path / "r", steps=500)
    live = run / "live.jsonl"
    with following(run, server.uri) as process:
        until(lambda: len(losses(server.uri)) == 500, "the first steps are there")
        for last in range(501, 2001):  # steps come faster than the store takes them
            with live.open("a") as file:
                file.write(lines_of(last, first=last))
            if last == 1200:
                server.kill()
            if last % 100 == 0:
                time.sleep(0.2)
        until(lambda: "cannot be written" in Path(f"{run}.log").read_text(), "the outage is told")
        assert process.poll() is None
        server.start()
        until(lambda: len(losses(server.uri)) == 2000, "what was missing is there")
        make_run(run, steps=2100)
        assert process.wait(PATIENCE) == 0
    make_export(run)
    track(run, server.uri, "llmpipe")
    assert losses(server.uri) == list(range(1, 2101))
    client = MlflowClient(server.uri)
    (found,) = client.search_runs(["1"], "tags.`llmpipe.kind` = 'run'")
    assert found.info.status == "FINISHED"
    assert {path.path for path in client.list_artifacts(found.info.run_id)} >= {"run.json", "metrics.jsonl"}
    (model,) = client.search_logged_models(["1"])
    assert model.source_run_id == found.info.run_id


def test_late_answers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training begins and ends before the server has answered once; then all of it is mirrored."""
    run, started = make_live(tmp_path / "r", steps=3), []
    popen = subprocess.Popen
    monkeypatch.setattr(follower.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with late(server) as slow:
        with follower.followed(run, slow.uri, "llmpipe", Layout(device="cpu").resolved()):
            until(slow.asked.is_set, "the follower has asked")
            make_run(run, steps=300)
        assert not slow.answered.is_set()
        slow.let_through.set()
        assert started[0].wait(PATIENCE) == 0
    assert losses(server.uri) == list(range(1, 301))
