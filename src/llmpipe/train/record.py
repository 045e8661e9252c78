"""What later stages read of a run's folder."""

import json
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError


def run_record(path: Path) -> dict[str, Any]:
    """A finished run's run.json; empty for what is no run's folder."""
    record = path / "run.json"
    if record.is_file():
        try:
            return dict(json.loads(record.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{record} is damaged ({error}): run finetune again") from error
    if (path / "job.json").is_file() or (path / "weights").is_dir():
        raise UserError(f"{path} has no run.json: this run is not finished; run finetune to its end first")
    return {}


def weights_of(path: Path) -> Path:
    """A run's weights; a checkpoint or rank files are their own."""
    return path / "weights" if run_record(path) else path


def identity(directory: Path) -> dict[str, str | None]:
    """A directory by its path, and by what is in it where it has a manifest."""
    known = (directory / manifest.NAME).is_file()
    return {"path": str(directory), "digest": manifest.read(directory).digest if known else None}
