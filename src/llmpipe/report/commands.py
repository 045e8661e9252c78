"""The commands that made a run, and what they took: from the logs and benchmark files of the workflow's rules."""

from dataclasses import dataclass
from pathlib import Path

from llmpipe.report.gather import Run, there
from llmpipe.track.stages import benchmark

LOGS = "logs"
PROMPT = "$ llmpipe "


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A command that ran."""

    name: str
    command: str
    """As it can be run again, from the project's folder."""
    seconds: float | None
    """None without a benchmark file."""
    peak_mb: float | None
    """Resident memory of the command and its children, in MB."""


def stages(run: Run) -> list[Stage]:
    """What made the run, in the order of the flow; of stages before and after it that kept no --log, nothing."""
    logs, found = there(run.folder, LOGS), list[Stage | None]()
    for stage, name in _names(run):
        logged = _stage(logs / stage / f"{name}.log", stage) if logs else None
        found.append(_told(run) if stage == "finetune" and logged is None else logged)
    return [stage for stage in found if stage]


def _told(run: Run) -> Stage | None:
    """The training's command as run.json has it."""
    command = (run.record.get("origin") or {}).get("command")
    return Stage(name="finetune", command=command, seconds=run.record.get("seconds"), peak_mb=None) if command else None


def _names(run: Run) -> list[tuple[str, str]]:
    """Stage, and what the workflow calls its log."""
    start, name = Path(run.record["model"]["path"]), run.folder.resolve().name
    model = start.parent.name
    ranks = [] if start.name == "checkpoint" else [f"{model}.{start.name}"]
    corpora = [
        Path(part["prefix"]).name for key in ("data", "validation", "test") for part in run.record.get(key) or []
    ]
    return [
        ("download", model), ("convert", model), ("verify", model),
        *(("tokenize", f"{model}.{corpus}") for corpus in dict.fromkeys(corpora)),
        *((stage, rank) for rank in ranks for stage in ("shard", "verify")),
        ("finetune", name), ("evaluate", name), ("export", name),
    ]  # fmt: skip


def _stage(log: Path, stage: str) -> Stage | None:
    if not log.is_file():
        return None
    command = _command(log)
    found = benchmark(log.with_suffix(".benchmark.tsv"))
    seconds, peak_mb = found.get("seconds"), found.get("peak_memory_megabytes")
    return Stage(name=stage, command=command, seconds=seconds, peak_mb=peak_mb) if command else None


def _command(log: Path) -> str | None:
    """The line with which a command's log begins."""
    with log.open(errors="replace") as file:
        found = next((line for line in file if PROMPT in line), "")
    return f"llmpipe {found.split(PROMPT, 1)[1].strip()}" if found else None
