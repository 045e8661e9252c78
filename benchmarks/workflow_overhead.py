"""What Snakemake adds to the demo: the same commands one after the other, by hand and by the workflow.

    python benchmarks/workflow_overhead.py FOLDER [--target demo]

Makes two fresh copies of the demo in FOLDER. The commands are those that `snakemake -n -p` names. A machine's speed may
change between the two, so it also says in how much of the workflow's time no job was at work, by Snakemake's records.
Then it, and `snakemake -n`, with nothing to do. Wants a quiet machine. Prints a table. A shorter target is
convert_tiny_llama.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MADE = ("results", "weights", "data", "logs", "mlruns", "mlflow.db*", ".snakemake", ".*lock")
PROMPT = "Shell command: "
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",  # as Snakemake sets it with one core
    "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",  # as the workflow sets these
    "MLFLOW_EXPERIMENT_NAME": "demo",
}


def fresh_demo(folder: Path) -> Path:
    """The demo as it is in a clone, beside the workflow."""
    for name in ("workflow", "slurm", "demo"):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns(*MADE))
    return folder / "demo"


def snakemake(demo: Path, *options: str) -> str:
    """What it says; it has to succeed."""
    command = ["snakemake", "--cores", "1", *options]
    done = subprocess.run(command, cwd=demo, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {demo}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def commands(demo: Path, target: str) -> list[str]:
    """In an order in which each finds its inputs; targets themselves have none."""
    lines = snakemake(demo, target, "--dry-run", "--printshellcmds").splitlines()
    found = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
    return [command for command in found if command != "None"]


def by_hand(demo: Path, found: list[str]) -> float:
    """Seconds of the commands one after the other."""
    for name in ("data", "weights", "logs/demo"):  # where the demo's own scripts write
        (demo / name).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for command in found:
        done = subprocess.run(command, shell=True, cwd=demo, env=ENVIRONMENT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def timed(demo: Path, *options: str) -> float:
    """Seconds of Snakemake."""
    start = time.perf_counter()
    snakemake(demo, *options)
    return time.perf_counter() - start


def at_work(demo: Path) -> float:
    """Seconds in which a job of the workflow was running; each output's record has its job's start and end."""
    records = [json.loads(file.read_text()) for file in (demo / ".snakemake/metadata").iterdir()]
    seconds, until = 0.0, 0.0
    for start, end in sorted((record["starttime"], record["endtime"]) for record in records):
        seconds += max(end - max(start, until), 0)
        until = max(end, until)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="demo")
    arguments = parser.parse_args()
    folder, target = arguments.folder.absolute(), arguments.target
    hand, workflow = fresh_demo(folder / "hand"), fresh_demo(folder / "workflow_run")
    found = commands(hand, target)
    alone, together = by_hand(hand, found), timed(workflow, target, "--quiet", "all")
    working = at_work(workflow)
    if "Nothing to be done" not in snakemake(workflow, target, "--dry-run"):
        sys.exit(f"snakemake has something to do again in {workflow}: see snakemake -n there")
    idle, planned = (
        statistics.median(timed(workflow, target, *options) for _ in range(5)) for options in ((), ("--dry-run",))
    )
    print("| what | seconds | allowed |\n|---|---:|---:|")
    print(f"| the {len(found)} commands of {target} by hand, one after the other | {alone:.1f} | |")
    print(f"| `snakemake --cores 1 {target}` | {together:.1f} | {1.1 * alone:.1f} |")
    print(f"| above the commands by hand | {100 * (together / alone - 1):+.1f} % | +10 % |")
    print(f"| the same, less the time in which its jobs ran | {together - working:.1f} | {0.1 * working:.1f} |")
    print(f"| `snakemake --cores 1 {target}` with nothing to do, the median of 5 | {idle:.2f} | 3 |")
    print(f"| `snakemake -n {target}` there, the same | {planned:.2f} | 3 |")


if __name__ == "__main__":
    main()
