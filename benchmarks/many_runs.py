"""What a thousand finished runs cost the commands that look at one or two of them, and Snakemake with nothing to do.

    python benchmarks/many_runs.py DEMO FOLDER [--runs 1000]

DEMO is the demo's folder after `make demo`. Makes the project FOLDER with copies of its run tiny_llama, each with a run
file, Snakemake's records and a place in the MLflow store of its own; large files are hard links. Prints a table.
"""

import argparse
import base64
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from llmpipe.files import read_json, write_json
from llmpipe.track.folders import read_run

RUN = "tiny_llama"
LIMIT = 10  # seconds
TABLES = ("runs", "params", "tags", "metrics", "latest_metrics")
"""MLflow's, that have rows of a run."""


def make_project(demo: Path, folder: Path) -> None:
    """The demo's files, without its checkpoints, beside the workflow's."""
    for name in ("workflow", "slurm"):
        shutil.copytree(demo.parent / name, folder.parent / name, dirs_exist_ok=True)
    shutil.copytree(demo, folder, symlinks=True, ignore=shutil.ignore_patterns("checkpoints", "*.lock", "mlruns"))


def add_run(project: Path, name: str) -> None:
    """A copy of the finished run, under another name and with an id of its own."""
    shutil.copy2(project / f"config/runs/{RUN}.yaml", project / f"config/runs/{name}.yaml")
    folder = project / "results/runs" / name
    shutil.copytree(project / "results/runs" / RUN, folder, copy_function=os.link)
    for path in (folder / "job.json", folder / "run.json", *folder.glob("tracked/*.json")):
        _write(path, path.read_text().replace(f"results/runs/{RUN}", f"results/runs/{name}"), path)
    record = read_json(folder / "run.json", "run make demo")
    record |= {"name": name, "origin": record["origin"] | {"training": name}}
    times = (folder / "run.json").stat()
    write_json(folder / "run.json", record)
    os.utime(folder / "run.json", ns=(times.st_atime_ns, times.st_mtime_ns))


def _write(path: Path, text: str, like: Path) -> None:
    """A new file, no longer a hard link, with the old one's time."""
    times = like.stat()
    path.unlink(missing_ok=True)
    path.write_text(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def add_records(project: Path, names: list[str]) -> None:
    """What Snakemake has noted of each output, so that it can tell whether its command has changed."""
    for path in list((project / ".snakemake/metadata").iterdir()):
        output = base64.b64decode(path.name).decode()
        if f"runs/{RUN}" in output:
            text = path.read_text()
            for name in names:
                target = base64.b64encode(output.replace(f"runs/{RUN}", f"runs/{name}").encode()).decode()
                renamed = text.replace(f"runs/{RUN}", f"runs/{name}").replace(f"/{RUN}.log", f"/{name}.log")
                (path.parent / target).write_text(renamed)


def add_to_store(project: Path, names: list[str]) -> int:
    """Copies of the run's rows, all its points with them, as tracked from their folders; how many points there are."""
    store = sqlite3.connect(project / "mlflow.db")
    (parent,) = store.execute("select run_uuid from runs where name = ?", (RUN,)).fetchone()
    found = "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?"
    children = [row[0] for row in store.execute(found, (parent,))]
    for number, name in enumerate(names):
        for run in (parent, *children):
            copy = f"{number:04}{run[4:]}"
            for table in TABLES:
                _copy_rows(store, table, run, copy, name if run == parent else None)
            tag = "where run_uuid = ? and key ="
            store.execute(f"update tags set value = value || ? {tag} 'llmpipe.identity'", (name, copy))  # a stage's
            store.execute(f"update tags set value = ? {tag} 'mlflow.parentRunId'", (f"{number:04}{parent[4:]}", copy))
        subject = read_run((project / "results/runs" / name).resolve())
        for key, value in (("identity", subject.identity), ("stamp", subject.stamp())):
            store.execute(f"update tags set value = ? {tag} ?", (value, f"{number:04}{parent[4:]}", f"llmpipe.{key}"))
    store.commit()
    return store.execute("select count(*) from metrics").fetchone()[0]


def _copy_rows(store: sqlite3.Connection, table: str, run: str, copy: str, name: str | None) -> None:
    columns = [row[1] for row in store.execute(f"pragma table_info({table})")]
    values = ["?" if column == "run_uuid" else "coalesce(?, name)" if (table, column) == ("runs", "name") else column
              for column in columns]  # fmt: skip
    given = [copy if column == "run_uuid" else name for column in columns
             if column == "run_uuid" or (table, column) == ("runs", "name")]  # fmt: skip
    store.execute(f"insert into {table} select {', '.join(values)} from {table} where run_uuid = ?", (*given, run))


def measured(project: Path, command: list[str]) -> tuple[float, float]:
    """Seconds on the clock and of CPU of a command in the project's folder, Python's start with it."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    taken, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or (command[0] == "snakemake" and "Nothing to be done" not in done.stdout + done.stderr):
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return taken, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    project = arguments.folder.absolute() / "project"
    names = [f"run{number:04}" for number in range(arguments.runs)]
    make_project(arguments.demo.absolute(), project)
    for name in names:
        add_run(project, name)
    add_records(project, names)
    points = add_to_store(project, names[2:])
    runs = [f"results/runs/{name}" for name in names[:2]]
    track = ["llmpipe", "track", runs[0], "--experiment", "demo"]
    commands = {
        "`llmpipe track` of a new run": track,
        "`llmpipe track` of it again": track,
        "`llmpipe track results`, all known but two": ["llmpipe", "track", "results", "--experiment", "demo"],
        "`llmpipe track results` again": ["llmpipe", "track", "results", "--experiment", "demo"],
        "`llmpipe report` of two runs": ["llmpipe", "report", *runs, "--output", "two.html"],
        "`snakemake -n` of a run, nothing to do": ["snakemake", "-n", f"finetune_{names[0]}"],
    }
    print(f"{len(names)} runs, {points:,} points in the store\n")
    print("| command | seconds | of CPU | limit |\n|---|---:|---:|---:|")
    for told, command in commands.items():
        taken, used = measured(project, command)
        print(f"| {told} | {taken:.1f} | {used:.1f} | {LIMIT} |", flush=True)


if __name__ == "__main__":
    main()
