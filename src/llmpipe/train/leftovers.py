"""A run folder tells of one training at a time: what another one told of itself stands beside its checkpoints.

RUN/checkpoints/HASH/   training.json, step-N/, and, while another training has the run folder, log.txt, system/, …
"""

import json
import logging
from pathlib import Path
from typing import Any

from llmpipe.train import origin
from llmpipe.train.job import Job

NAMES = ("log.txt", "system", "ranks", "profile")
"""What attempts add to, in the run folder."""
log = logging.getLogger(__name__)


def set_aside(job: Job) -> None:
    """If the run folder is that of another training, move what it told to its checkpoints, and this one's back."""
    other = _training_there(job)
    if other in (None, job.checkpoints):
        return
    moved = _move(job.run, other)
    if moved:
        log.warning("%s was another training's: its %s are in %s now", job.run, ", ".join(moved), other)
    _move(job.checkpoints, job.run)


def _training_there(job: Job) -> Path | None:
    """The folder of checkpoints of the training that RUN/job.json tells of; None where it tells of none."""
    training = _read(job.path).get("origin", {}).get("training")
    known = (job.run / "checkpoints").glob(f"*/{origin.TRAINING}")
    return next((path.parent for path in known if training and _read(path).get("training") == training), None)


def _read(path: Path) -> dict[str, Any]:
    """What a file tells; nothing where it is not there, or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _move(source: Path, target: Path) -> list[str]:
    """Those of NAMES that are in a folder, into another one, which keeps what it has."""
    moved = [name for name in NAMES if (source / name).exists() and not (target / name).exists()]
    for name in moved:
        (source / name).rename(target / name)
    return moved
