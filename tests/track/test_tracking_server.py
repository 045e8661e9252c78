"""A real `mlflow server` that is down, slow, or dies while a training goes on: nothing is missing or doubled."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from followers import PATIENCE, losses, until
from mlflow import MlflowClient
from mlflow.entities import Run
from run_folders import make_export, make_live, make_run
from tracking_server import Server, late

from finetune_command import (
    LLMPIPE,
    assert_trained_alike,
    finetune_arguments,
    processes_of,
    train_undisturbed,
    wait_for_step,
)
from llmpipe.layout import Layout
from llmpipe.track import follower
from llmpipe.track.curves import CHARTS


@pytest.fixture
def server(tmp_path: Path, empty_store: bytes) -> Iterator[Server]:
    """Not started yet."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_store)
    made = Server(folder)
    yield made
    made.kill()


@pytest.fixture
def arguments(checkpoint: Path, dataset: Path, server: Server, tmp_path: Path) -> list[str]:
    """Of a training of 60 steps into run/, tracked by the server."""
    return [*finetune_arguments(checkpoint, dataset, tmp_path), "--track-uri", server.uri]


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same training, tracked nowhere."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_undisturbed(finetune_arguments(checkpoint, dataset, folder), folder / "run")


@contextmanager
def finetuning(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """`llmpipe finetune`, ended with the block if it has not ended before."""
    process = subprocess.Popen([*LLMPIPE, *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def paused(run: Path) -> Iterator[None]:
    """Its ranks stand still: what happens in the block falls into the training, however fast that is."""
    ranks = [pid for pid, command in processes_of(run).items() if " -m llmpipe.train " in command]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert ranks and not (run / "run.json").exists(), "the training had ended already"
        yield
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)


def is_outage_told(run: Path) -> bool:
    log = run / "track.log"
    return log.exists() and "cannot be written" in log.read_text()


def test_killed_and_started_again(server: Server, arguments: list[str], tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    server.start()
    with finetuning(arguments) as training:
        wait_for_step(run, 3)
        with paused(run):
            until(lambda: losses(server.uri), "the first steps are there")
            server.kill()
        wait_for_step(run, 20)
        with paused(run):
            until(lambda: is_outage_told(run), "the outage is told")
            server.start()
            until(lambda: len(losses(server.uri)) >= 20, "what was missing is there")
        assert training.wait(PATIENCE) == 0
    assert_trained_alike(run, undisturbed)
    assert_all_is_there_once(run, server.uri)


@pytest.mark.slow
def test_down_until_the_training_has_ended(
    server: Server, arguments: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    with finetuning(arguments) as training:
        wait_for_step(run, 3)
        with paused(run):
            until(lambda: is_outage_told(run), "the outage is told")
        assert training.wait(PATIENCE) == 0
    assert_trained_alike(run, undisturbed)
    server.start()
    assert_all_is_there_once(run, server.uri)


def assert_all_is_there_once(run: Path, uri: str) -> None:
    """After an export and `llmpipe track`: a run, a child a stage, the model, and each number of the run's files."""
    make_export(run)
    subprocess.run([*LLMPIPE, "track", str(run), "--uri", uri], check=True)
    until(lambda: not processes_of(run), "the follower has ended")  # it may have written as well
    client = MlflowClient(uri)
    found = sorted(client.search_runs(["1"]), key=lambda each: str(each.info.run_name))
    assert [each.info.run_name for each in found] == ["convert", "export", "finetune", "run", "verify"]
    assert {each.info.status for each in found} == {"FINISHED"}
    training = found.pop(3)
    assert {each.data.tags["mlflow.parentRunId"] for each in found} == {training.info.run_id}
    assert curves(client, training) == written(run)
    assert {path.path for path in client.list_artifacts(training.info.run_id)} >= {"run.json", "metrics.jsonl"}
    (model,) = client.search_logged_models(["1"])
    assert model.source_run_id == training.info.run_id


def curves(client: MlflowClient, training: Run) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each point of each chart in the store."""
    histories = {chart: client.get_metric_history(training.info.run_id, chart) for chart in training.data.metrics}
    return {chart: sorted((point.step, point.value) for point in points) for chart, points in histories.items()}


def written(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl, and of the node's file, whose lines count as steps; memory is charted in 10⁹ bytes."""
    (node,) = run.glob("system/*.jsonl")
    steps, samples = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (run / "metrics.jsonl", node)
    )
    points = [
        (CHARTS[key], line["step"], value / 1e9 if key == "memory_bytes" else value)
        for line in steps
        for key, value in line.items()
        if key in CHARTS and value is not None and key not in ("loss_scale", "skipped_steps")  # 1 and 0: no charts
    ]
    points += [
        (f"system/{key}", number, value)
        for number, line in enumerate(samples, 1)
        for key, value in line.items()
        if key != "time"
    ]
    return {chart: sorted((step, value) for of, step, value in points if of == chart) for chart, *_ in points}


def test_late_answers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training begins and ends before the server has answered once; then all of it is mirrored."""
    server.start()
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
