"""A user's project folder with the shipped config files, and Snakemake in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SNAKEFILE = f"""
include: "{ROOT}/workflow/Snakefile"


rule project:
    default_target: True
    input:
        rules.all.input,
    localrule: True
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder like demo/: the Snakefile of docs/workflow.md, the shipped config/, a link to slurm/."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    (folder / "Snakefile").write_text(SNAKEFILE)
    return folder


@pytest.fixture
def inputs(project: Path) -> None:
    """Something where `source:` and `files:` of the shipped config files point."""
    for model in ("7b", "13b", "70b"):
        (project / f"weights/llama-2-{model}").mkdir(parents=True)
    (project / "data").mkdir()
    (project / "data/corpus.jsonl").write_text('{"text": "one"}\n')


@pytest.fixture
def snakemake(project: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Snakemake in the project, stdout and stderr together; a job's `llmpipe` is the stub beside this file."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    stub = binaries / "llmpipe"
    stub.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("stub.py").read_text())
    stub.chmod(0o755)
    environment = {
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=project, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return run
