"""The launcher: resources of a job, the lease, stopping and dying in order."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from llmpipe.checkpoint import manifest
from llmpipe.cli import group
from llmpipe.errors import UserError
from llmpipe.launch import lease, resources
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.loop import train
from llmpipe.verify import card


class Resources(dict):
    """As the plugin reads a job's resources: by key and by attribute."""

    __getattr__ = dict.__getitem__


def submitted(layout: Layout) -> str:
    """The sbatch line that the Slurm plugin itself makes of our resources."""
    job = SimpleNamespace(resources=Resources(resources(layout), mem_mb=1000), threads=16, name="finetune")
    params = {"run_uuid": "u", "slurm_logfile": "l", "comment_str": "c", "account": "", "partition": "", "workdir": ""}
    return get_submit_command(job, params) + set_gres_string(job)


def test_one_node_is_one_task_with_its_gpus() -> None:
    line = submitted(Layout(nodes=1, gpus_per_node=8))
    assert "--nodes=1" in line and "--gpus=8" in line and "--gpus-per-node=8" in line and "--cpus-per-task=16" in line
    assert "--ntasks-per-gpu" not in line and "--signal=TERM@120" in line


def test_four_nodes_have_one_launcher_each() -> None:
    line = submitted(Layout(nodes=4, gpus_per_node=8, tp=8, pp=4))
    assert "--nodes=4" in line and "--ntasks=4" in line and "--gpus=32" in line and "--gpus-per-node=8" in line
    assert "--ntasks-per-gpu" not in line


def test_cpu_processes_ask_for_no_gpu() -> None:
    assert "gpu" not in submitted(Layout(gpus_per_node=4, device="cpu"))


def test_a_second_trainer_is_kept_out(tmp_path: Path) -> None:
    with lease(tmp_path, 0), pytest.raises(UserError, match="is being trained by"), lease(tmp_path, 0):
        pass
    with lease(tmp_path, 0):
        assert json.loads((tmp_path / "lease").read_text())["pid"] == os.getpid()


@pytest.fixture
def command(checkpoint: Path, dataset: Path, tmp_path: Path) -> list[str]:
    """`llmpipe finetune` of two processes over 40 steps, with a card that lets it start."""
    model = tmp_path / "checkpoint"
    model.symlink_to(checkpoint)
    digest = manifest.read(checkpoint).digest
    passed = {"verdict": "pass", "subject": {"path": str(model), "digest": digest}, "checks": []}
    (tmp_path / "verify.json").write_text(json.dumps(passed))
    assert card.require_card(model) is None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{seq_len: 32, global_batch: 8, steps: 40, lr: 1e-3, precision: fp32, save_every: 10}")
    return [
        sys.executable, "-m", "llmpipe", "finetune", str(recipe), "--model", str(model), "--data", str(dataset),
        "--output", str(tmp_path / "run"), "--tp", "2", "--gpus-per-node", "2", "--micro-batch", "4", "--device", "cpu",
        "--threads", "2",
    ]  # fmt: skip


def wait_for_step(run: Path, step: int) -> None:
    """Until the metrics have this many lines; a minute at most."""
    live = run / "live.jsonl"
    for _ in range(600):
        if live.exists() and len(live.read_text().splitlines()) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {live}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}/{k}": v for p in (run / "weights").glob("*.safetensors") for k, v in load_file(p).items()}


def test_stopped_killed_and_started_again_ends_as_if_undisturbed(command: list[str], tmp_path: Path) -> None:
    undisturbed = [part.replace("/run", "/undisturbed") for part in command]
    assert subprocess.run(undisturbed, check=False).returncode == 0

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
    ours, expected = weights(run), weights(tmp_path / "undisturbed")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


def wait_until_no_rank_lives(run: Path) -> None:
    """kill -9 of the launcher ends its torchrun and ranks; half a minute at most."""
    for _ in range(300):
        lines = subprocess.check_output(["ps", "-eo", "stat,args"], text=True).splitlines()
        if not any(str(run) in line and not line.startswith("Z") for line in lines):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of {run} live on")


def test_only_the_first_node_of_a_slurm_job_hosts_the_rendezvous(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("llmpipe.launch._supervise", lambda argv, *_: started.append(argv) or 0)
    for node in ("0", "1"):
        environment = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": node}
        result = CliRunner().invoke(group, [*command[3:], "--nodes", "2", "--master", "node0:20007"], env=environment)
        assert result.exit_code == 0, result.output
    assert ["--rdzv-conf=is_host=1" in argv for argv in started] == [True, False]
    assert ["--rdzv-conf=is_host=0" in argv for argv in started] == [False, True]


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tp", "3"], r"tp 3 x pp 1 x cp 1 x dp -1 does not make 2 processes .* has to be one of \[1, 2\]"),
        (["--tp", "8", "--gpus-per-node", "8"], r"tp 8 does not divide 4 query heads and 2 KV heads.*"),
        (["--pp", "3", "--tp", "1", "--gpus-per-node", "3"], r"pp 3 does not divide 4 layers"),
        (["--micro-batch", "3"], r"global_batch 8 is not divisible by dp 1 x micro_batch 3"),
        (["--tp", "1", "--pp", "2", "--micro-batch", "8"], r"1 micro-batches .* fewer than its 2 stages"),
        (["--device", "cuda"], r"wants 2 GPUs on each node, and torch sees 0 here"),
        (["--split", "0,50,50"], r"the train part of .* holds no tokens"),
        (["--split", "1,2"], r"three shares for train, validation and test are expected"),
        (["--nodes", "2", "--dp", "2"], r"2 nodes take a Slurm job, or .* --node-rank R --master HOST:PORT"),
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
