"""A run's folder, finished or still training, as the stages after it read it.

A reader asks once whether it is finished, for a training may publish between two looks.
"""

import json
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import read_json
from llmpipe.train.job import read_job
from llmpipe.train.record import of_job

MAKE_AGAIN = "run the stage that makes it again"


def is_run(folder: Path) -> bool:
    """Whether a training began there."""
    return is_finished(folder) or (folder / "job.json").is_file()


def is_finished(folder: Path) -> bool:
    """Whether it was published."""
    return (folder / "run.json").is_file()


def read_record(folder: Path, finished: bool) -> dict[str, Any]:
    """run.json; of a run that is not finished what job.json says, in the same form. UserError for damaged ones."""
    return read_json(folder / "run.json", MAKE_AGAIN) if finished else of_job(read_job(folder / "job.json"))


def metrics_file(folder: Path, finished: bool) -> Path:
    """A line for each step: metrics.jsonl of a finished run, else live.jsonl, which may not be there yet."""
    return folder / ("metrics.jsonl" if finished else "live.jsonl")


def read_metrics(folder: Path, finished: bool) -> list[dict[str, Any]]:
    """The lines of `metrics_file`; UserError for a damaged one. The last one of a live file may be half written."""
    path = metrics_file(folder, finished)
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    if lines and not finished and not lines[-1].endswith("\n"):
        lines.pop()
    return [_step(path, number, line) for number, line in enumerate(lines, 1)]


def _step(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is damaged ({error}): run finetune again") from error


def located(folder: Path, path: str) -> Path:
    """Where a path of run.json lies: it counts from where the training was started, here or above the run's folder."""
    above = folder.resolve().parents
    return next((base / path for base in (Path(), *above) if (base / path).exists()), Path(path))


def cards_of(model: Path) -> dict[str, Path]:
    """The verification cards of the weights that a run started from, and of the checkpoint they were sharded from."""
    stems = ["verify", f"{model.name}.verify"]
    return {
        f"verify/{stem}.{kind}": model.parent / f"{stem}.{kind}"
        for stem in stems
        for kind in ("json", "md", "html")
        if (model.parent / f"{stem}.{kind}").is_file()
    }
