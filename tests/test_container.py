"""Commands that start themselves again in a container: its stand-in is a program that tells what it is to start."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune_command import finetune_arguments
from llmpipe import container
from llmpipe.cli import group

IMAGE = """#!/bin/sh
echo "in the image: $*; the variable is ${LLMPIPE_CONTAINER:-not set}"
"""
ON_TWO_NODES = ["--nodes", "2", "--dp", "2"]
JOB = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "LLMPIPE_LEASE": "token"}


class Entered(Exception):
    """What this process would have become."""


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a container that is not there."""
    monkeypatch.setattr("os.execvp", lambda program, argv: (_ for _ in ()).throw(Entered(program, *argv)))
    monkeypatch.setenv(container.PREFIX, "apptainer exec 'an image.sif'")
    return ["apptainer", "apptainer", "exec", "an image.sif", "llmpipe"]


def llmpipe(prefix: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmpipe", *arguments]
    return subprocess.run(command, env={container.PREFIX: prefix}, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["inspect", "a b"], ["--help"]], ids=" ".join)
def test_a_command_runs_in_the_image(arguments: list[str], tmp_path: Path) -> None:
    """Its own `llmpipe`, with the same arguments."""
    (tmp_path / "an image").mkdir()
    (tmp_path / "an image/llmpipe").write_text(IMAGE)
    (tmp_path / "an image/llmpipe").chmod(0o755)
    done = llmpipe(f"env 'PATH={tmp_path}/an image:/usr/bin:/bin'", *arguments)
    assert done.stdout == f"in the image: {' '.join(arguments)}; the variable is not set\n", done.stderr


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("no-such-program exec x", "no-such-program cannot be started: No such file or directory"),
        ("apptainer exec 'x", "No closing quotation"),
    ],
)
def test_a_container_that_is_not_there_is_told(prefix: str, text: str) -> None:
    done = llmpipe(prefix, "doctor")
    assert done.returncode == 1 and done.stderr == f"ERROR LLMPIPE_CONTAINER: {text}\n"


@pytest.mark.parametrize(
    ("variables", "more"),
    [
        ({}, []),
        (JOB | {"SLURM_STEP_ID": "0"}, []),  # as Snakemake's plugin starts a training on one node
        ({}, [*ON_TWO_NODES, "--dry-run"]),
        ({}, [*ON_TWO_NODES, "--master", "node0:20007"]),  # by hand
        (STEP, [*ON_TWO_NODES, "--master", "node0:20007"]),  # by srun
    ],
)
def test_a_training_enters_where_its_ranks_are_started(
    variables: dict[str, str], more: list[str], checkpoint: Path, dataset: Path, tmp_path: Path, prefix: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = [*finetune_arguments(checkpoint, dataset, tmp_path), *more]
    monkeypatch.setattr("sys.argv", ["llmpipe", *arguments])
    result = CliRunner().invoke(group, arguments, env=variables)
    assert isinstance(result.exception, Entered), result.output
    assert [*result.exception.args] == [*prefix, *arguments]


@pytest.mark.parametrize("more", [ON_TWO_NODES, []], ids=["two nodes", "one node"])
def test_srun_is_called_outside_and_what_it_starts_knows_the_container(
    more: list[str], checkpoint: Path, dataset: Path, tmp_path: Path, prefix: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's script calls the training itself. GPUs are the nodes' matter: torch may see none out here."""
    called: list[tuple[list[str], dict[str, str]]] = []

    def supervise_srun(argv: list[str], variables: dict[str, str], _: object) -> int:
        called.append((argv, variables))
        (tmp_path / "run/stop").touch()
        return 0

    monkeypatch.setattr("llmpipe.launch.supervise_srun", supervise_srun)
    arguments = [*finetune_arguments(checkpoint, dataset, tmp_path), *more]
    arguments[arguments.index("cpu")] = "cuda"
    result = CliRunner().invoke(group, arguments, env=JOB)
    assert result.exit_code == 75, result.output
    ((argv, variables),) = called
    assert argv[0] == "srun" and prefix[0] not in argv
    assert variables[container.PREFIX] == "apptainer exec 'an image.sif'"
