"""Slurm and its partitions."""

import re
from collections.abc import Iterator
from itertools import groupby

from llmpipe.doctor.finding import Finding, note, ok, told_by

FORMAT = "%P|%a|%l|%D|%c|%G"
"""Partition (the default one with *), up or down, time limit, nodes, CPUs and GPUs of a node."""
SECONDS = 1.0
"""For each of two questions of less weight, so that all fit into doctor's time."""


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
    settings = _settings()
    if settings.get("AccountingStorageType") == "accounting_storage/slurmdbd":
        yield ok("accounting", "there: slurm-status-command: sacct, in slurm/config.yaml, knows jobs for longer")
    killing = _killing() if settings.get("PreemptType") == "preempt/partition_prio" else {}
    for name, rows in groupby(sorted(lines), key=lambda line: line.split("|")[0]):
        yield _partition(name, [row.split("|") for row in rows], killing.get(name.rstrip("*"), ""))


def _settings() -> dict[str, str]:
    """slurm.conf, as the controller has it; empty without an answer."""
    lines, _ = told_by("scontrol", "show", "config", seconds=SECONDS)
    return dict(re.findall(r"(?m)^(\w+) *= (\S+)", "\n".join(lines or [])))


def _killing() -> dict[str, str]:
    """The PreemptMode of partitions whose jobs make room for those of others without a grace time."""
    lines, _ = told_by("scontrol", "--oneliner", "show", "partition", seconds=SECONDS)
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines or []]
    highest = max((int(one["PriorityTier"]) for one in partitions), default=0)
    return {
        one["PartitionName"]: one["PreemptMode"]
        for one in partitions
        if int(one["PriorityTier"]) < highest and one["GraceTime"] == "0"
    }


def _partition(name: str, rows: list[list[str]], killing: str) -> Finding:
    """A partition; nodes of several kinds have a row each."""
    kinds = "; ".join(f"{nodes} nodes of {cpus} CPUs{_gpus(gres)}" for *_, nodes, cpus, gres in rows)
    default = ", the default" if name.endswith("*") else ""
    found = f"{kinds}; time limit {rows[0][2]}{default}"
    label = f"partition {name.rstrip('*')}"
    if rows[0][1] != "up":
        return note(label, f"{rows[0][1]}: {found}", "jobs in it would wait")
    if "REQUEUE" in killing:
        advice = "set slurm-requeue: true in slurm/config.yaml, in the place of slurm-no-requeue"
    elif "CANCEL" in killing:
        advice = "nothing starts them again: docs/slurm.md, Preemption"
    else:
        return ok(label, found)
    return note(label, f"{found}; jobs of more priority may kill its own, without a grace time ({killing})", advice)


def _gpus(gres: str) -> str:
    return f" and {gres}" if gres.startswith("gpu") else ""
