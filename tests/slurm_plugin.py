"""The lines that Snakemake's Slurm plugins make of a job's resources: sbatch's, and srun's in the batch script."""

from types import SimpleNamespace
from typing import Any

from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm_jobstep import get_cpu_setting, get_gpu_setting, get_node_setting

from llmpipe.launch import resources
from llmpipe.layout import Layout


class Resources(dict):
    """As the plugin reads a job's resources: by key and by attribute."""

    __getattr__ = dict.__getitem__


def training(layout: Layout, threads: int = 16, **more: Any) -> SimpleNamespace:
    """The job of a run's layout; `more` are resources that a profile adds."""
    return job("finetune", **(resources(layout) | {"threads": threads} | more))


def job(name: str, threads: int, **given: Any) -> SimpleNamespace:
    """A job as the plugins see it."""
    return SimpleNamespace(resources=Resources({"mem_mb": 1000} | given), threads=threads, name=name)


def sbatch_line(job: SimpleNamespace, log: str = "l") -> str:
    """What submits a job."""
    params = {"run_uuid": "u", "slurm_logfile": log, "comment_str": "c", "account": "", "partition": "", "workdir": ""}
    return get_submit_command(job, params) + set_gres_string(job)


def srun_line(job: SimpleNamespace) -> str:
    """What its batch script puts before the command of a job that is not several launchers (a false `mpi`)."""
    has_gpus = job.resources.get("gpu", 0) > 0
    return f"srun -n1 --cpu-bind=q {get_cpu_setting(job, has_gpus)} {get_gpu_setting(job)} {get_node_setting(job)}"
