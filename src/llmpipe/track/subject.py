"""What one MLflow run shows, and what its readers have in common."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import llmpipe
from llmpipe.track.curves import Curves
from llmpipe.track.reading import reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset that a training reads."""

    name: str
    digest: str
    prefix: str
    part: str
    """train, validation or test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A training, a stage of one, or a model: one MLflow run."""

    kind: Literal["run", "stage", "model"]
    name: str
    folder: Path
    identity: str
    """What a second tracking finds the first one by."""
    digest: str = ""
    """Of what was made: a run's weights, a model's checkpoint; empty while a run trains."""
    status: Literal["RUNNING", "FINISHED", "FAILED"] = "FINISHED"
    description: str = ""
    """Markdown, at the head of the run's page."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of the whole, not of a step."""
    curves: list[Curves] = field(default_factory=list)
    artifacts: dict[str, Path] = field(default_factory=dict)
    """What a file is called in the store → the file."""
    datasets: list[Dataset] = field(default_factory=list)
    export: Path | None = None
    """The exported model."""
    stages: "list[Subject]" = field(default_factory=list)
    start_ms: int
    end_ms: int

    def stamp(self) -> str:
        """The same as long as no file of it and of its stages has changed, by names, sizes and times."""
        files = [*self.artifacts.values(), *(curves.path for curves in self.curves)]
        paths = sorted({path.absolute() for path in files})  # some count from the current folder
        with reading(self.folder):
            found = [(str(path), info.st_size, info.st_mtime_ns) for path in paths if (info := path.stat())]
        stages = [stage.stamp() for stage in self.stages]
        return digest_of(llmpipe.__version__, self.status, found, stages)


def digest_of(*values: Any) -> str:
    """One SHA-256 of some values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots; lists joined by commas; nothing for None."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{key}.")
        elif item is not None:
            found[f"{prefix}{key}"] = ",".join(map(str, item)) if isinstance(item, list) else str(item)
    return found


def existing(files: dict[str, Path]) -> dict[str, Path]:
    """Those that are there."""
    return {name: path for name, path in files.items() if path.is_file()}


def metric_name(name: str) -> str:
    """The name without the characters that MLflow refuses."""
    return re.sub(r"[^\w.\-/ :]", "_", name)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mtime_ms(path: Path) -> int:
    """When a file was written, in milliseconds since 1970."""
    return int(path.stat().st_mtime * 1000)
