"""What later stages read of a run's folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.data.dataset.manifest import template_of
from llmpipe.errors import UserError
from llmpipe.train.job import Job


def of_job(job: Job) -> dict[str, Any]:
    """As much of run.json as the job alone tells; hashes are None where its launcher did not tell them."""

    def listed(data: dict[str, float]) -> list[dict[str, Any]]:
        return [
            {"prefix": key, "weight": weight, "digest": job.inputs.data.get(key), "template": template_of(Path(key))}
            for key, weight in data.items()
        ]

    return {
        "name": job.run.name,
        "recipe": asdict(job.recipe),
        "layout": asdict(job.layout),
        "split": job.split,
        "data": listed(job.data),
        "validation": listed(job.validation),
        "test": listed(job.test),
        "model": {"path": job.model, "checkpoint_digest": job.inputs.model or None},
        "steps": job.recipe.steps,
        "config_files": job.config_files,
        "origin": job.origin,
    }


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
