"""Slurm and its partitions."""

from collections.abc import Iterator
from itertools import groupby

from llmpipe.doctor.finding import Finding, note, ok, told_by

FORMAT = "%P|%a|%l|%D|%c|%G"
"""Partition (the default one with *), up or down, time limit, nodes, CPUs and GPUs of a node."""


def slurm() -> Iterator[Finding]:
    """What sinfo says; a machine without Slurm is no fault."""
    version, _ = told_by("sinfo", "--version")
    lines, why = told_by("sinfo", "--noheader", f"--format={FORMAT}")
    if lines is None and not why:
        yield note("Slurm", "not on this machine", "snakemake -c all runs everything here, without --profile slurm")
        return
    if lines is None:
        advice = "ask with sinfo; is this a submitting host, is munge up?"
        yield note("Slurm", f"installed, but it does not answer: {why}", advice)
        return
    yield ok("Slurm", (version or ["slurm, of no known version"])[0])
    if not lines:
        yield note("partitions", "none", "the cluster has none that you may use: ask its administrators")
    for name, rows in groupby(sorted(lines), key=lambda line: line.split("|")[0]):
        yield _partition(name, [row.split("|") for row in rows])


def _partition(name: str, rows: list[list[str]]) -> Finding:
    """A partition; nodes of several kinds have a row each."""
    kinds = "; ".join(f"{nodes} nodes of {cpus} CPUs{_gpus(gres)}" for *_, nodes, cpus, gres in rows)
    default = ", the default" if name.endswith("*") else ""
    found = f"{kinds}; time limit {rows[0][2]}{default}"
    label = f"partition {name.rstrip('*')}"
    return ok(label, found) if rows[0][1] == "up" else note(label, f"{rows[0][1]}: {found}", "jobs in it would wait")


def _gpus(gres: str) -> str:
    return f" and {gres}" if gres.startswith("gpu") else ""
