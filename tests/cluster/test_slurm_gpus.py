"""The GPUs of a job on the real Slurm: what the plugin asks for in our name, and what each launcher gets.

The devices are fake, Slurm's counting is not.
"""

import re
import shlex
from getpass import getuser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from private_slurm import PrivateSlurm

from llmpipe.launch import Place, _srun
from llmpipe.layout import Layout
from slurm_plugin import job, sbatch_line, srun_line, training

DOCS = Path(__file__).parents[2] / "docs"
KIND = {"gpu_model": "h100", "slurm_extra": "--gpus-per-node=h100:4 --signal=TERM@120"}
"""As slurm/config.yaml has it in its comments; tests/workflow takes it from there."""
PROFILES: list[dict[str, Any]] = [{}, KIND, {"constraint": "80gb"}]


def gpus_of(asking: SimpleNamespace, step: str, slurm: PrivateSlurm) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is where a job's step runs, a line each."""
    slurm.up()
    # Snakemake takes all but the job's id out of the environment of a job's command.
    script = f"""env -i PATH="$PATH" SLURM_JOB_ID="$SLURM_JOB_ID" {step} sh -c 'echo "$CUDA_VISIBLE_DEVICES"'"""
    line = sbatch_line(asking, f"{slurm.folder}/log/gpus-%j.txt")
    number = slurm.call(*shlex.split(line), "--wait", f"--wrap={script}").strip()
    said = (slurm.folder / f"log/gpus-{number}.txt").read_text().splitlines()
    return sorted(line for line in said if "lacks support for cpu binding" not in line)


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_each_node_of_a_training_has_its_gpus(profile: dict[str, str], slurm: PrivateSlurm, monkeypatch) -> None:
    layout = Layout(nodes=2, gpus_per_node=4).resolved()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    *step, _ = shlex.join(_srun(layout, Place(threads=2))).partition(" --export=ALL ")
    assert gpus_of(training(layout, threads=2, runtime=2, **profile), step[0], slurm) == ["0: 0,1,2,3", "1: 0,1,2,3"]


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_a_training_on_one_node_has_its_gpus(profile: dict[str, str], slurm: PrivateSlurm) -> None:
    asking = training(Layout(nodes=1, gpus_per_node=4).resolved(), threads=2, runtime=2, **profile)
    assert gpus_of(asking, srun_line(asking), slurm) == ["0,1,2,3"]


@pytest.mark.parametrize("profile", [{}, {"gpu_model": "h100"}, {"constraint": "80gb"}], ids=str)
def test_an_evaluation_has_its_gpus(profile: dict[str, str], slurm: PrivateSlurm) -> None:
    asking = job("evaluate", 16, nodes=1, gpu=2, runtime=2, **profile)
    assert gpus_of(asking, srun_line(asking), slurm) == ["0,1"]


def test_a_kind_that_no_node_has_is_refused(slurm: PrivateSlurm) -> None:
    line = sbatch_line(training(Layout(gpus_per_node=4).resolved(), **KIND | {"gpu_model": "h900"}))
    with pytest.raises(RuntimeError, match=r"Requested node configuration is not available|Invalid generic resource"):
        slurm.call(*shlex.split(line), "--wrap=true")


def test_the_doctor_runs_on_a_node(slurm: PrivateSlurm) -> None:
    """A command of docs/doctor.md, as it stands there. What takes long on a busy machine it gives up, and says so."""
    slurm.up()
    command = "srun --gpus=1 llmpipe doctor"
    assert f"`{command}`" in (DOCS / "doctor.md").read_text()
    said = slurm.call("bash", "-c", command)
    assert re.search("(?m)^ok +Python ", said), said
    assert re.search(r"(?m)^\w+ +torch ", said) and re.search(r"(?m)^\w+ +(Slurm|partition main) ", said), said


def test_jobs_are_found_by_what_they_make_and_where(slurm: PrivateSlurm, tmp_path: Path) -> None:
    """A command of docs/slurm.md, as it stands there."""
    slurm.up()
    command = "squeue -u $USER -o '%i %k %T %Z'"
    assert f"`{command}`" in (DOCS / "slurm.md").read_text()
    asked = ("--parsable", "--hold", "--output=/dev/null", f"--chdir={tmp_path}", "--comment=rule_finetune_wildcards_a")
    number = slurm.call("sbatch", *asked, "--wrap=true").strip()
    said = slurm.call("bash", "-c", command, USER=getuser()).splitlines()
    assert f"{number} rule_finetune_wildcards_a PENDING {tmp_path}" in said
    slurm.cancel_jobs()
