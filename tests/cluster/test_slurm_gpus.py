"""The GPUs of a job on the real Slurm: what the plugin asks for in our name, and what each launcher gets.

The devices are fake, Slurm's counting is not.
"""

import shlex
from types import SimpleNamespace
from typing import Any

import pytest
from private_slurm import PrivateSlurm

from llmpipe.launch import Place, _srun
from llmpipe.layout import Layout
from slurm_plugin import job, sbatch_line, srun_line, training

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
