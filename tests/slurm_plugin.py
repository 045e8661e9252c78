"""The sbatch line that Snakemake's Slurm plugin makes of a training's resources."""

from types import SimpleNamespace
from typing import Any

from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from llmpipe.launch import resources
from llmpipe.layout import Layout


class Resources(dict):
    """As the plugin reads a job's resources: by key and by attribute."""

    __getattr__ = dict.__getitem__


def sbatch_line(layout: Layout, log: str = "l", threads: int = 16, **more: Any) -> str:
    """Of a run's layout; `more` are resources that a profile adds."""
    job = SimpleNamespace(
        resources=Resources(resources(layout) | {"mem_mb": 1000} | more), threads=threads, name="finetune"
    )
    params = {"run_uuid": "u", "slurm_logfile": log, "comment_str": "c", "account": "", "partition": "", "workdir": ""}
    return get_submit_command(job, params) + set_gres_string(job)
