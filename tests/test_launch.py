"""The launcher: resources of a job, the lease, stopping and dying in order."""

import re
import shlex
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from finetune_command import (
    LLMPIPE,
    assert_trained_alike,
    finetune_arguments,
    train_undisturbed,
    wait_for_step,
    wait_until_no_rank_lives,
)
from llmpipe.checkpoint import manifest
from llmpipe.cli import group
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.loop import train
from slurm_plugin import sbatch_line, training

TWO_NODES = ["--nodes", "2", "--dp", "2", "--master"]


def test_one_node_is_one_task_with_its_gpus() -> None:
    line = sbatch_line(training(Layout(nodes=1, gpus_per_node=8)))
    assert "--nodes=1" in line and "--gpus=8" in line and "--gpus-per-node=8" in line and "--cpus-per-task=16" in line
    assert "--ntasks-per-gpu" not in line and "--signal=TERM@120" in line


def test_four_nodes_have_one_launcher_each() -> None:
    line = sbatch_line(training(Layout(nodes=4, gpus_per_node=8, tp=8, pp=4)))
    assert "--nodes=4" in line and "--ntasks=4" in line and "--gpus=32" in line and "--gpus-per-node=8" in line
    assert "--ntasks-per-gpu" not in line


def test_cpu_processes_ask_for_no_gpu() -> None:
    assert "gpu" not in sbatch_line(training(Layout(gpus_per_node=4, device="cpu")))


@pytest.fixture
def command(checkpoint: Path, dataset: Path, tmp_path: Path) -> list[str]:
    """`llmpipe finetune` of two processes over 40 steps, with a card that lets it start."""
    return [*LLMPIPE, *finetune_arguments(checkpoint, dataset, tmp_path)]


@pytest.mark.slow
def test_stopped_killed_and_started_again_ends_as_if_undisturbed(command: list[str], tmp_path: Path) -> None:
    undisturbed = train_undisturbed(command[len(LLMPIPE) :], tmp_path / "undisturbed")
    run = tmp_path / "run"
    first = subprocess.Popen(command)
    wait_for_step(run, 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75
    saved = sorted(run.glob("checkpoints/*/step-*/manifest.json"))
    assert saved and not (run / "run.json").exists() and not (run / "weights").exists()

    second = subprocess.Popen(command)
    wait_for_step(run, 21)
    second.kill()
    second.wait()
    wait_until_no_rank_lives(run)

    assert subprocess.run(command, check=False).returncode == 0
    assert_trained_alike(run, undisturbed)


def test_only_the_first_node_of_a_slurm_job_hosts_the_rendezvous(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("llmpipe.launch.supervise_torchrun", lambda argv, *_: started.append(argv) or 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/job.json").touch()
    for node in ("0", "1"):
        environment = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": node, "LLMPIPE_LEASE": "token"}
        result = CliRunner().invoke(group, [*command[3:], "--nodes", "2", "--master", "node0:20007"], env=environment)
        assert result.exit_code == 0, result.output
    assert ["is_host=1" in shlex.join(argv) for argv in started] == [True, False]
    assert ["is_host=0" in shlex.join(argv) for argv in started] == [False, True]


def test_a_finished_run_is_not_trained_again_but_one_of_other_inputs_is(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    recipe = Recipe(seq_len=32, global_batch=8, steps=2, lr=1e-3, precision="fp32")
    layout = Layout(device="cpu", micro_batch=8).resolved()
    job = Job(
        recipe=recipe, layout=layout, model=str(checkpoint), data={str(dataset): 1.0}, split=[90, 5, 5],
        output=str(tmp_path / "run"),
    )  # fmt: skip
    assert not job.is_finished()
    job.run.mkdir()
    run_ranks(train, 1, job)
    assert job.is_finished()
    assert not replace(job, recipe=replace(recipe, lr=1e-4)).is_finished()
    assert not replace(job, recipe=replace(recipe, steps=3)).is_finished()
    (job.run / "weights/manifest.json").unlink()
    assert not job.is_finished()


def test_a_record_of_another_version_is_none_and_a_damaged_one_is_told(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    recipe = Recipe(seq_len=32, global_batch=8, steps=2, lr=1e-3, precision="fp32")
    job = Job(
        recipe=recipe, layout=Layout(device="cpu").resolved(), model=str(checkpoint), data={str(dataset): 1.0},
        split=[90, 5, 5], output=str(tmp_path),
    )  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"")
    manifest.write(tmp_path / "weights", "weights", {})
    (tmp_path / "run.json").write_text('{"version": 1}')
    assert not job.is_finished()
    (tmp_path / "run.json").write_text('{"version"')
    with pytest.raises(UserError, match=r"run\.json is damaged .* run finetune again"):
        job.is_finished()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tp", "3"], r"tp 3 x pp 1 x cp 1 x dp -1 does not make 2 processes .* has to be one of \[1, 2\]"),
        (["--tp", "8", "--gpus-per-node", "8"], r"tp 8 does not divide 4 query heads and 2 KV heads.*"),
        (["--pp", "3", "--tp", "1", "--gpus-per-node", "3"], r"pp 3 does not divide 4 layers"),
        (["--micro-batch", "3"], r"global_batch 8 is not divisible by dp 1 x micro_batch 3 = 3: .* to 6 or 9 say"),
        (["--tp", "1", "--pp", "2", "--micro-batch", "8"], r"1 micro-batches .* fewer than its 2 stages"),
        (["--device", "cuda"], r"wants 2 GPUs on each node, and torch sees 0 here"),
        (["--split", "0,50,50"], r"the train part of .* holds no tokens"),
        (["--split", "1,2"], r"three shares for train, validation and test are expected"),
        (["--nodes", "2", "--dp", "2"], r"2 nodes take a Slurm job, or .* --node-rank R --master HOST:PORT"),
        ([*TWO_NODES, "here:1", "--node-rank", "2"], r"--node-rank 2: 2 --nodes are counted from 0"),
        ([*TWO_NODES, "here"], r"--master here: HOST:PORT of the node with --node-rank 0 is expected"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(
    command: list[str], options: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = CliRunner().invoke(group, [*command[3:], *options])
    assert isinstance(result.exception, UserError)
    assert re.search(text, str(result.exception)), str(result.exception)


def test_without_a_card_nothing_trains(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "verify.json").unlink()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "llmpipe verify" in result.stderr and "Traceback" not in result.stderr
