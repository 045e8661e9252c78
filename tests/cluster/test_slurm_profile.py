"""What the shipped profile says in comments, on the real Slurm."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from drill_project import RECORD, RUN, DrillProject, assert_same
from private_slurm import PrivateSlurm

ROOT = Path(__file__).parents[2]
MODULES = ". ./modules.sh && module load cuda/12.8"
LOADED = """
rule loaded:
    output: "loaded"
    shell: "echo $LOADED > {output}"
"""
VERSION = """
rule version:
    output: "version"
    shell: "llmpipe --version > {output}"
"""
UNSHARE = ("unshare", "--user", "--map-current-user", "--mount")
APPTAINER = """#!/bin/sh
test "$1 $2 $3 $4 $5" = "exec --nv --bind /data /images/llmpipe.sif" || exit 1
shift 5
echo "$SLURMD_NODENAME $*" >> {image}/started.txt
PATH={image}/bin:/usr/bin:/bin exec {unshare} "$@"
"""
"""A stand-in: a mount namespace of its own, and of this Slurm's commands there is none."""
IN_CONTAINER = ('# precommand: "export LLMPIPE_CONTAINER', 'precommand: "export LLMPIPE_CONTAINER')
STAGES = """
rule all:
    input: "convert", "tokenize", "finetune"
""" + "".join(
    f"""
rule {stage}:
    output: "{stage}"
    resources: mem_mb=100, runtime=10
    shell: "scontrol show job --oneliner $SLURM_JOB_ID > {{output}}"
"""
    for stage in ("convert", "tokenize", "finetune")
)


def write_profile(folder: Path, *changes: tuple[str, str]) -> None:
    """The shipped one with changes: where a line first begins with the first text of a pair, it has the second one."""
    profile = (ROOT / "slurm/config.yaml").read_text()
    for old, new in changes:
        assert re.search(rf"(?m)^ *{re.escape(old)}", profile), f"the shipped profile has no line with {old}"
        profile = re.sub(rf"(?m)^( *){re.escape(old)}", lambda found, new=new: found[1] + new, profile, count=1)
    (folder / "slurm").mkdir()
    (folder / "slurm/config.yaml").write_text(profile)


def run_jobs(slurm: PrivateSlurm, folder: Path, snakefile: str, *changes: tuple[str, str]) -> None:
    """Run a Snakefile's first rule under the shipped profile with changes."""
    slurm.up()
    (folder / "Snakefile").write_text(snakefile)
    write_profile(folder, *changes)
    quick = Path(__file__).with_name("quick_snakemake.py")
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, quick, "--profile", "slurm"],
        cwd=folder, env=slurm.environment | cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_controller_that_does_not_answer_for_a_while(slurm: PrivateSlurm, tmp_path: Path) -> None:
    """By itself the plugin forgets its jobs after five failures in a row, and Snakemake waits for ever."""
    with slurm.failing("squeue", times=12):
        run_jobs(slurm, tmp_path, VERSION)
    assert (tmp_path / "version").read_text().startswith("llmpipe")


def test_modules_are_loaded_before_each_job(slurm: PrivateSlurm, tmp_path: Path) -> None:
    """`module` is a shell's function, which a file defines, as on clusters."""
    (tmp_path / "modules.sh").write_text('module() { export LOADED="$2"; }\n')
    line = '# precommand: ". /etc/profile.d/modules.sh && module load cuda/12.8"'
    run_jobs(slurm, tmp_path, LOADED, (line, f'precommand: "{MODULES}"'))
    assert (tmp_path / "loaded").read_text() == "cuda/12.8\n"


def test_account_partition_time_and_memory(slurm: PrivateSlurm, tmp_path: Path) -> None:
    """What Slurm says of jobs by whose profile the CPUs' stages go to one partition, the training to another one."""
    run_jobs(
        slurm, tmp_path, STAGES,
        ('# slurm_account: "…"', 'slurm_account: "lab"'),
        ('# slurm_partition: "cpu"', 'slurm_partition: "urgent"'),
        ('# slurm_partition: "gpu"', 'slurm_partition: "main"'),  # of finetune
        ("# mem_mb: 400000", "mem_mb: 400000"),
        ("# tokenize: ", "tokenize: "),
        ("#   runtime: 600", "  runtime: 600"),
    )  # fmt: skip
    names = ("Account", "Partition", "TimeLimit", "MinMemoryNode")
    told = {
        stage: [re.findall(rf" {name}=(\S+)", (tmp_path / stage).read_text())[0] for name in names]
        for stage in ("convert", "tokenize", "finetune")
    }
    assert told == {
        "convert": ["lab", "urgent", "00:10:00", "100M"],
        "tokenize": ["lab", "urgent", "10:00:00", "100M"],
        "finetune": ["lab", "main", "1-00:00:00", "400000M"],
    }


@pytest.fixture
def image(slurm: PrivateSlurm) -> Iterator[Path]:
    """What a container has: llmpipe. Its started.txt lists the commands that were started in one, and their nodes."""
    if subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("the stand-in of a container takes user namespaces, which this system does not allow")
    folder, apptainer = slurm.folder / "image", slurm.folder / "bin/apptainer"
    llmpipe = folder / "bin/llmpipe"
    llmpipe.parent.mkdir(parents=True)
    llmpipe.write_text(f'#!/bin/sh\nexec {sys.executable} -m llmpipe "$@"\n')
    apptainer.write_text(APPTAINER.format(image=folder, unshare=" ".join(UNSHARE)))
    for program in (llmpipe, apptainer):
        program.chmod(0o755)
    yield folder
    apptainer.unlink()
    shutil.rmtree(folder)


def test_jobs_run_llmpipe_in_a_container(slurm: PrivateSlurm, tmp_path: Path, image: Path) -> None:
    run_jobs(slurm, tmp_path, VERSION, IN_CONTAINER)
    assert (image / "started.txt").read_text() == "node1 llmpipe --version\n"
    assert (tmp_path / "version").read_text().startswith("llmpipe, version")


def test_a_training_on_two_nodes_in_containers(project: DrillProject, undisturbed: DrillProject, image: Path) -> None:
    """The launcher of all, outside, calls srun; each node's own one and its ranks are in a container."""
    (project.folder / "slurm").unlink()  # a link
    write_profile(project.folder, IN_CONTAINER)
    project.start(RECORD)
    project.until_saved()
    ranks = [pid for rank in range(4) for pid in project.slurm.processes(f"RANK={rank}")]
    spaces = [Path(f"/proc/{pid}/ns/mnt").readlink() for pid in ranks]
    assert len(spaces) == 4 and len({*spaces}) == 2 and Path("/proc/self/ns/mnt").readlink() not in spaces
    project.finish()
    started = sorted((image / "started.txt").read_text().splitlines())
    assert [line.split()[:3] for line in started] == [[node, "llmpipe", "finetune"] for node in ("node1", "node2")]
    assert all(f"--output results/runs/{RUN} " in line and " --master=" in line for line in started)
    assert_same(project, undisturbed)
