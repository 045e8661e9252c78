"""The process that mirrors a training while it goes on: live, down, slow, at the end."""

import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from followers import PATIENCE, following, losses, until
from run_folders import lines_of, make_live, make_run

from llmpipe.layout import Layout
from llmpipe.track import follower, mirror
from llmpipe.track.folders import subjects
from llmpipe.track.writer import Writer


def test_curves_are_live_and_the_follower_ends_with_the_run(uri: str, tmp_path: Path) -> None:
    run = make_live(tmp_path / "r", steps=3)
    with following(run, uri) as process:
        until(lambda: losses(uri) == [1, 2, 3], "the first steps are there")
        with (run / "live.jsonl").open("a") as file:
            file.write(lines_of(5, first=4))
        until(lambda: losses(uri) == [1, 2, 3, 4, 5], "new steps are there")
        make_run(run, steps=7)
        assert process.wait(PATIENCE) == 0
    assert losses(uri) == list(range(1, 8))


def test_what_is_published_in_the_middle_of_a_look_is_seen_by_the_next(uri: str, tmp_path: Path) -> None:
    run = make_live(tmp_path / "r", steps=3)
    found, writer = subjects(run), Writer(uri, "llmpipe")
    make_run(run, steps=7)
    assert not mirror._follow_once(writer, found)
    assert mirror._follow_once(writer, subjects(run))
    assert losses(uri) == list(range(1, 8))


def test_asked_to_end_it_looks_once_more(uri: str, tmp_path: Path) -> None:
    run = make_live(tmp_path / "r", steps=3)
    with following(run, uri) as process:
        until(lambda: losses(uri) == [1, 2, 3], "the first steps are there")
        with (run / "live.jsonl").open("a") as file:
            file.write(lines_of(4, first=4))
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert losses(uri) == [1, 2, 3, 4]


def test_a_store_that_is_down_is_tried_again(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two looks fail; nothing is missing in the end, and each failure is told."""
    run, opened, told = make_live(tmp_path / "r", steps=3), [], []
    real = mirror.Writer

    def opens(*arguments):
        opened.append(arguments)
        if len(opened) == 2:
            make_run(run, steps=4)
        if len(opened) < 3:
            raise ConnectionError("nobody listens")
        return real(*arguments)

    monkeypatch.setattr(mirror, "Writer", opens)
    monkeypatch.setattr(mirror, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(mirror.log, "warning", lambda *what: told.append(what[0] % what[1:]))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        mirror.follow(run, uri, "llmpipe")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert losses(uri) == [1, 2, 3, 4] and len(opened) == 3
    assert len(told) == 2 and "nobody listens" in told[0] and "tried again in 0 s" in told[0]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes every connection and answers none: slower than any server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for each in taken:
            each.close()


def test_a_training_waits_for_no_store(silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is left while the follower waits for an answer that never comes; asked to end, it does so."""
    run = make_live(tmp_path / "r")
    monkeypatch.setattr(mirror, "LAST_SECONDS", 1)
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        follower.subprocess, "Popen", lambda *given, **more: started.append(popen(*given, **more)) or started[0]
    )
    with follower.followed(run, silent_server, "llmpipe", Layout(device="cpu").resolved()):
        until((run / "track.log").is_file, "the follower has begun")
        assert started[0].poll() is None
    assert started[0].poll() is None, "the training has waited for the follower"
    started[0].kill()
    started[0].wait()


@pytest.mark.parametrize(
    ("uri", "nodes", "job", "follows"),
    [
        ("sqlite:///mlflow.db", 1, None, True),
        ("sqlite:///mlflow.db", 2, None, False),
        ("sqlite:///mlflow.db", 1, "815", False),
        ("http://host:5000", 2, "815", True),
        (None, 1, None, False),
    ],
)
def test_who_may_write(
    uri: str | None, nodes: int, job: str | None, follows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An sqlite file has one machine's writers only; in a Slurm job it is the submitting host that writes."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    started = []

    class Process:
        def __init__(self, command: list[str], **_: object):
            started.append(command)

        def terminate(self) -> None:
            started.append(["ended"])

    monkeypatch.setattr(follower.subprocess, "Popen", Process)
    with follower.followed(tmp_path, uri, "mine", Layout(nodes=nodes, device="cpu").resolved()):
        assert len(started) == follows
    assert len(started) == 2 * follows
    assert not follows or "--follow" in started[0]
