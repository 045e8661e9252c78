"""What the shipped profile says in comments, on the real Slurm."""

import re
import subprocess
import sys
from pathlib import Path

from private_slurm import PrivateSlurm

ROOT = Path(__file__).parents[2]
MODULES = ". ./modules.sh && module load cuda/12.8"
SNAKEFILE = """
rule loaded:
    output: "loaded"
    shell: "echo $LOADED > {output}"
"""


def test_modules_are_loaded_before_each_job(slurm: PrivateSlurm, tmp_path: Path) -> None:
    """`module` is a shell's function, which a file defines, as on clusters."""
    slurm.up()
    (tmp_path / "modules.sh").write_text('module() { export LOADED="$2"; }\n')
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    shipped = (ROOT / "slurm/config.yaml").read_text()
    profile, found = re.subn(r'(?m)^# precommand: ".* && module load cuda/12.8"$', f'precommand: "{MODULES}"', shipped)
    assert found == 1
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/config.yaml").write_text(profile)
    quick = Path(__file__).with_name("quick_snakemake.py")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, quick, "--profile", "slurm", "loaded"],
        cwd=tmp_path, env=slurm.environment | cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "loaded").read_text() == "cuda/12.8\n"
