"""What the files of a finished stage say, as a tracking store wants it: params, tags, metrics, curves, artifacts."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.files import read_json

RUN_FILES = (
    "run.json",
    "metrics.jsonl",
    "weights/manifest.json",
    "evaluate/table.json",
    "evaluate/table.md",
    "evaluate/table.html",
    "export/README.md",
    "export/check.json",
    "export/manifest.json",
)

MAKE_AGAIN = "run the stage that makes it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A run's or a model's folder."""

    kind: str
    """run or model."""
    folder: Path
    digest: str
    """Of the run's weights or the model's checkpoint."""
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    """Numbers of the whole run, not of a step."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl."""
    artifacts: dict[str, Path]
    """What a file is called in the store → the file."""
    start_ms: int
    end_ms: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> str:
        """The same for the same weights made in the same way: what a second tracking finds the first one by."""
        table = json.dumps([self.kind, self.name, self.digest, sorted(self.params.items())])
        return hashlib.sha256(table.encode()).hexdigest()


def subjects(results: Path) -> list[Subject]:
    """The folder's own subject, or those of every finished run and model in a results folder."""
    results = results.resolve()
    if (results / "run.json").is_file():
        return [read_run(results)]
    if (results / "checkpoint" / manifest.NAME).is_file():
        return [read_model(results)]
    models = sorted(path.parents[1] for path in results.glob(f"models/*/checkpoint/{manifest.NAME}"))
    runs = sorted(path.parent for path in results.glob("runs/*/run.json"))
    if not models and not runs:
        raise UserError(
            f"{results} holds nothing finished: a run's folder has run.json, a model's has checkpoint/{manifest.NAME},"
            " a results folder has such folders in runs/ and models/; finish a stage first"
        )
    return [read_model(folder) for folder in models] + [read_run(folder) for folder in runs]


def read_run(folder: Path) -> Subject:
    """A run that finetune finished, with whatever later stages have added to its folder."""
    run = read_json(folder / "run.json", MAKE_AGAIN)
    model = run.get("model") or {}
    files = {name: folder / name for name in RUN_FILES}
    configs = map(Path, run.get("config_files") or [])
    files |= {
        f"config/{path.parent.name}/{path.name}": path for path in configs
    }  # a run's and its recipe's are namesakes
    cards = cards_of(Path(model["path"])) if model.get("path") else {}
    end_ms = int((folder / "run.json").stat().st_mtime * 1000)
    return Subject(
        kind="run",
        folder=folder,
        digest=weights_digest(folder, run),
        params=run_params(run),
        tags=run_tags(run),
        metrics=run_metrics(run) | table_metrics(folder / "evaluate" / "table.json") | card_metrics(cards),
        curves=read_lines(folder / "metrics.jsonl"),
        artifacts={name: path for name, path in (files | cards).items() if path.is_file()},
        start_ms=end_ms - int(1000 * (run.get("seconds") or 0)),
        end_ms=end_ms,
    )


def read_model(folder: Path) -> Subject:
    """A converted model with its cards, and the corpora tokenized for it."""
    checkpoint = manifest.read(folder / "checkpoint")
    cards = {f"verify/{path.name}": path for path in sorted(folder.glob("*verify.*"))}
    files = {"checkpoint/manifest.json": folder / "checkpoint" / manifest.NAME}
    files |= {"config.json": folder / "checkpoint" / "config.json"} | cards
    files |= {f"corpora/{path.name}": path for path in sorted(folder.glob("corpora/*.manifest.json"))}
    config = files["config.json"]
    made_ms = int(files["checkpoint/manifest.json"].stat().st_mtime * 1000)
    return Subject(
        kind="model",
        folder=folder,
        digest=checkpoint.digest,
        params=flat({"source": checkpoint.source, "config": read_json(config, MAKE_AGAIN) if config.is_file() else {}}),
        tags={"llmpipe": checkpoint.version},
        metrics=card_metrics(cards),
        artifacts={name: path for name, path in files.items() if path.is_file()},
        start_ms=made_ms,
        end_ms=made_ms,
    )


def weights_digest(folder: Path, run: dict[str, Any]) -> str:
    """What the run made, by its manifest; an older folder without one is known by what run.json says."""
    if (folder / "weights" / manifest.NAME).is_file():
        return manifest.read(folder / "weights").digest
    if run.get("weights_digest"):
        return run["weights_digest"]
    raise UserError(f"{folder} has run.json but no weights/{manifest.NAME}: run finetune again")


def cards_of(model: Path) -> dict[str, Path]:
    """The verification cards of the weights that a run started from, and of the checkpoint they were sharded from."""
    stems = ["verify", f"{model.name}.verify"]
    return {
        f"verify/{stem}.{kind}": model.parent / f"{stem}.{kind}"
        for stem in stems
        for kind in ("json", "md", "html")
        if (model.parent / f"{stem}.{kind}").is_file()
    }


def run_params(run: dict[str, Any]) -> dict[str, str]:
    data = {Path(part["prefix"]).name: part.get("weight", 1.0) for part in run.get("data") or []}
    told = {key: run.get(key) for key in ("recipe", "layout", "shape", "split")}
    return flat(told | {"model": (run.get("model") or {}).get("path"), "data": data})


def run_tags(run: dict[str, Any]) -> dict[str, str]:
    tags = {key: str(run[key]) for key in ("exit_reason", "llmpipe", "torch") if run.get(key)}
    digests = {f"model.{key}": value for key, value in (run.get("model") or {}).items() if key.endswith("digest")}
    digests |= {f"data.{Path(part['prefix']).name}.digest": part.get("digest") for part in run.get("data") or []}
    return tags | {key: str(value) for key, value in digests.items() if value}


def run_metrics(run: dict[str, Any]) -> dict[str, float]:
    return {f"total.{key}": float(run[key]) for key in ("steps", "tokens", "seconds") if is_number(run.get(key))}


def table_metrics(path: Path) -> dict[str, float]:
    """The evaluation table, one metric a cell."""
    rows = read_json(path, MAKE_AGAIN)["rows"] if path.is_file() else []
    return {
        metric_name(f"evaluate.{row['task']}.{row['metric']}.{side}"): float(row[side])
        for row in rows
        for side in ("before", "after")
        if is_number(row.get(side))
    }


def card_metrics(cards: dict[str, Path]) -> dict[str, float]:
    """What the verification measured."""
    read = {path.stem: read_json(path, MAKE_AGAIN) for path in cards.values() if path.suffix == ".json"}
    return {
        metric_name(f"{stem}.{check['name']}"): float(check["value"])
        for stem, card in read.items()
        for check in card.get("checks", [])
        if is_number(check.get("value"))
    }


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots; lists joined by commas; nothing for None."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{key}.")
        elif item is not None:
            found[f"{prefix}{key}"] = ",".join(map(str, item)) if isinstance(item, list) else str(item)
    return found


def metric_name(name: str) -> str:
    """The name without the characters that MLflow refuses."""
    return re.sub(r"[^\w.\-/ :]", "_", name)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if there is no file."""
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}): run finetune again") from error
    return lines
