"""What the files of a run's folder say, and those of the model and the data that it was made from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.data.dataset import manifest as dataset_manifest
from llmpipe.data.statistics import Statistics, statistics
from llmpipe.errors import UserError
from llmpipe.files import read_json
from llmpipe.train.run_folder import MAKE_AGAIN, cards_of, is_finished, is_run, located, read_metrics, read_record

NEEDED = ("model", "data", "recipe", "layout", "split")
"""What a report takes for granted of run.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset that a run trained on, or held out."""

    name: str
    part: str
    """train, validation or test."""
    weight: float
    """In the blend of its part."""
    digest: str | None
    """Of its files when the run was made."""
    prefix: str
    """Its path without .bin and .idx, as the run was given it."""
    facts: dict[str, Any] | None
    """Its manifest, if it has one and still lies there."""
    statistics: Statistics | None
    missing: str
    """Why there are no statistics."""
    is_same: bool | None
    """Whether the run read the very bytes that lie there now; None where that cannot be told."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, read. Of stages that have not been, there is None."""

    folder: Path
    name: str
    """The folder's name, or its path where others in a report have the same name."""
    record: dict[str, Any]
    """run.json; of a run that is not finished what job.json says, in the same form."""
    finished: bool
    curves: list[dict[str, Any]]
    """The lines of metrics.jsonl, or of live.jsonl."""

    @cached_property
    def model(self) -> Path | None:
        """The rank files or the checkpoint that it started from, if they still lie there."""
        return there(self.folder, self.record["model"]["path"])

    @cached_property
    def cards(self) -> dict[Path, dict[str, Any]]:
        """The verification cards of what it started from."""
        paths = cards_of(self.model).values() if self.model else []
        return {path: read_json(path, MAKE_AGAIN) for path in paths if path.suffix == ".json"}

    @cached_property
    def table(self) -> dict[str, Any] | None:
        """The evaluation."""
        return _read_if_there(self.folder / "evaluate" / "table.json")

    @cached_property
    def check(self) -> dict[str, Any] | None:
        """The export, compared with the trained model."""
        return _read_if_there(self.folder / "export" / "check.json")

    @cached_property
    def datasets(self) -> list[Dataset]:
        """What it trained on; and datasets of their own that were held out."""
        parts = {"train": "data", "validation": "validation", "test": "test"}
        return [_dataset(self, part, entry) for part, key in parts.items() for entry in self.record.get(key) or []]

    @cached_property
    def resumed(self) -> int:
        """How often it was started again from a checkpoint."""
        log = self.folder / "log.txt"
        return log.read_text(errors="replace").count(" resumed after step ") if log.is_file() else 0


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs, by names that tell them apart."""
    by_name = [folder.resolve().name for folder in folders]
    names = [name if by_name.count(name) == 1 else str(folder) for name, folder in zip(by_name, folders, strict=True)]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """A run's folder, finished or not; UserError for what is none."""
    if not is_run(folder):
        inside = sorted(str(path.parent) for path in folder.glob("*/run.json"))[:4]
        hint = f"; in it there are {', '.join(inside)}" if inside else ""
        raise UserError(
            f"{folder} is no run's folder: it has neither run.json nor job.json, which finetune writes{hint};"
            " name a folder of results/runs"
        )
    finished = is_finished(folder)
    record = read_record(folder, finished)
    if unsaid := [key for key in NEEDED if key not in record]:
        raise UserError(
            f"{folder}/{'run' if finished else 'job'}.json says nothing of {', '.join(unsaid)}: another version of"
            " llmpipe wrote it, or something else; run finetune again"
        )
    return Run(folder=folder, name=name, record=record, finished=finished, curves=read_metrics(folder, finished))


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path, MAKE_AGAIN) if path.is_file() else None


def there(folder: Path, path: str) -> Path | None:
    """Where a path that run.json says lies now, if it does."""
    found = located(folder, path)
    return found if found.exists() else None


def _dataset(run: Run, part: str, entry: dict[str, Any]) -> Dataset:
    index = there(run.folder, f"{entry['prefix']}.idx")
    prefix, found, missing, digest = index and index.with_suffix(""), None, "", entry.get("digest")
    is_same = dataset_manifest.digest(prefix) == digest if prefix and digest else None
    if prefix is None:
        missing = "its files are not where the run read them"
    elif is_same is False:
        missing = "it was made again since the run read it"
    else:
        found = _statistics(prefix, part, run.record)
    return Dataset(
        name=Path(entry["prefix"]).name,
        part=part,
        weight=entry.get("weight", 1.0),
        digest=digest,
        prefix=entry["prefix"],
        facts=dataset_manifest.read(prefix) if prefix and not missing else None,
        statistics=found,
        missing=missing,
        is_same=is_same,
    )


def _statistics(prefix: Path, part: str, record: dict[str, Any]) -> Statistics:
    recipe = record["recipe"]
    told = {key: recipe[key] for key in ("packing", "isolate_documents") if key in recipe}
    split = record["split"] if part == "train" else [1.0, 0.0, 0.0]
    return statistics(prefix, split, "train", recipe["seq_len"], recipe.get("seed", 1234), **told)


def read_manifest(directory: Path | None) -> manifest.Manifest | None:
    """A directory's manifest, if it has one."""
    return manifest.read(directory) if directory and (directory / manifest.NAME).is_file() else None
