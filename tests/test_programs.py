"""Programs that are asked something."""

import subprocess

import pytest

from llmpipe.programs import ask


def test_what_it_says_and_its_status() -> None:
    done = ask("sh", "-c", "echo found; echo wrong >&2; exit 3", seconds=60)
    assert (done.stdout, done.stderr, done.returncode) == ("found\n", "wrong\n", 3)
    with pytest.raises(FileNotFoundError):
        ask("no-such-program", seconds=60)


def test_one_that_does_not_end_when_it_is_killed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what waits in a driver: kill is asked for, and changes nothing."""
    asked: list[subprocess.Popen[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "kill", lambda process: asked.append(process))
        with pytest.raises(subprocess.TimeoutExpired):
            ask("sleep", "600", seconds=0.1)
    (process,) = asked
    assert process.poll() is None
    process.kill()
    process.wait()
