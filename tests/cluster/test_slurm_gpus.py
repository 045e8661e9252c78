"""The GPUs of a training's job on the real Slurm: what the plugin asks for in our name, and what each launcher gets.

The devices are fake, Slurm's counting is not.
"""

import shlex

import pytest
from private_slurm import PrivateSlurm

from llmpipe.launch import Place, _srun
from llmpipe.layout import Layout
from slurm_plugin import sbatch_line

KIND = {"gpu_model": "h100", "slurm_extra": "--gpus-per-node=h100:4 --signal=TERM@120"}
"""As slurm/config.yaml has it in its comments; tests/workflow takes it from there."""


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("profile", [{}, KIND, {"constraint": "80gb"}], ids=str)
def test_each_node_has_its_gpus(
    nodes: int, profile: dict[str, str], slurm: PrivateSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.up()
    layout, log = Layout(nodes=nodes, gpus_per_node=4).resolved(), f"{slurm.folder}/log/gpus-%j.txt"
    line = sbatch_line(layout, log, threads=2, runtime=2, **profile)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    *step, _ = shlex.join(_srun(layout, Place(threads=2))).partition(" --export=ALL ")
    # Snakemake takes all but the job's id out of the environment of a job's command.
    script = f"""env -i PATH="$PATH" SLURM_JOB_ID="$SLURM_JOB_ID" {step[0]} sh -c 'echo "$CUDA_VISIBLE_DEVICES"'"""
    job = slurm.call(*shlex.split(line), "--wait", f"--wrap={script}").strip()
    said = (slurm.folder / f"log/gpus-{job}.txt").read_text()
    assert sorted(said.splitlines()) == [f"{node}: 0,1,2,3" for node in range(nodes)]


def test_a_kind_that_no_node_has_is_refused(slurm: PrivateSlurm) -> None:
    line = sbatch_line(Layout(gpus_per_node=4).resolved(), **KIND | {"gpu_model": "h900"})
    with pytest.raises(RuntimeError, match=r"Requested node configuration is not available|Invalid generic resource"):
        slurm.call(*shlex.split(line), "--wrap=true")
