"""What a failed Snakemake has left in Slurm's queue is cancelled; the drill of Ctrl-C does so on a real Slurm."""

from pathlib import Path

import pytest

from llmpipe.project import left_jobs
from llmpipe.project.left_jobs import cancel_left_jobs

SAID = "Building DAG of jobs...\nSLURM run ID: 3f-1\nJob 0 has been submitted with SLURM jobid 815\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "snakemake.log"
    file.write_text(SAID)
    return file


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what stands for Slurm's; others are found beside."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_what_is_left_is_cancelled_by_its_runs_name(log: Path, programs: Path) -> None:
    write(programs / "squeue", "case \"$*\" in *'-o %i'*--name=3f-1*) echo 815; echo 816;; esac")
    write(programs / "scancel", f'echo "$@" >> {programs}/cancelled')
    assert cancel_left_jobs([str(log)]) == "Cancelled what was left in Slurm's queue: 815 816"
    assert (programs / "cancelled").read_text() == "815 816\n"


@pytest.mark.parametrize("said", [SAID, "Building DAG of jobs...\n"], ids=["none is left", "not on Slurm"])
def test_nothing_is_cancelled_where_nothing_is_left(said: str, log: Path, programs: Path) -> None:
    log.write_text(said)
    write(programs / "squeue", "exit 0" if said == SAID else "echo 815")
    write(programs / "scancel", f"touch {programs}/cancelled")
    assert cancel_left_jobs([str(log)]) == ""
    assert not (programs / "cancelled").exists()


def test_a_queue_that_does_not_answer_is_not_waited_for(log: Path, programs: Path, monkeypatch) -> None:
    write(programs / "squeue", "exec sleep 60")
    monkeypatch.setattr(left_jobs, "SECONDS", 0.5)
    assert "Look with: squeue --name=3f-1" in cancel_left_jobs([str(log)])
