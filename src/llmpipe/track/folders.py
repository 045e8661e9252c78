"""What the folders of trainings and models say, as a tracking store wants it."""

from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.files import read_json
from llmpipe.layout import Layout
from llmpipe.track.curves import Curves
from llmpipe.track.describe import described
from llmpipe.track.stages import card_metrics, stages, table_metrics
from llmpipe.track.subject import Dataset, Subject, digest_of, existing, flat, mtime_ms
from llmpipe.train import failure
from llmpipe.train.run_folder import (
    MAKE_AGAIN,
    cards_of,
    is_finished,
    is_run,
    located,
    metrics_file,
    read_record,
)

RUN_FILES = (
    "run.json", "metrics.jsonl", "weights/manifest.json", "evaluate/table.json", "evaluate/table.md",
    "evaluate/table.html", "export/README.md", "export/check.json", "export/manifest.json",
)  # fmt: skip


def subjects(results: Path) -> list[Subject]:
    """The folder's own subject, or those of every model, and of every run begun or finished, in a results folder."""
    results = results.resolve()
    if is_run(results):
        return [read_run(results)]
    if (results / "checkpoint" / manifest.NAME).is_file():
        return [read_model(results)]
    models = sorted(path.parents[1] for path in results.glob(f"models/*/checkpoint/{manifest.NAME}"))
    runs = sorted(folder for folder in results.glob("runs/*") if is_run(folder))
    if not models and not runs:
        raise UserError(
            f"{results} holds nothing to track: a run's folder has run.json, or job.json while it trains, a model's has"
            f" checkpoint/{manifest.NAME}, a results folder has such folders in runs/ and models/; make one first"
        )
    return [read_model(folder) for folder in models] + [read_run(folder) for folder in runs]


def read_run(folder: Path) -> Subject:
    """A training, finished or under way, with its stages before and after."""
    finished = is_finished(folder)
    record = read_record(folder, finished)
    digest, params = _weights_digest(folder, record) if finished else "", _params(record)
    origin = record.get("origin") or {}
    identity = origin.get("training") or digest_of("run", folder.name, digest, sorted(params.items()))
    end_ms = mtime_ms(folder / ("run.json" if finished else "job.json"))
    start_ms = int(origin.get("started_ms", end_ms - int(1000 * (record.get("seconds") or 0))))
    table = folder / "evaluate" / "table.json"
    curves = _curves(folder, record, finished)
    return Subject(
        kind="run",
        name=folder.name,
        folder=folder,
        identity=identity,
        digest=digest,
        status=_status(folder, record, finished),
        description=described(folder, record),
        params=params,
        tags=_tags(record, [each.host for each in curves if each.host]),
        metrics={f"tasks/{name}": value for name, value in table_metrics(table).items()},
        curves=curves,
        artifacts=_artifacts(folder, record, finished),
        datasets=_datasets(record),
        export=folder / "export" if (folder / "export" / manifest.NAME).is_file() else None,
        stages=stages(folder, record, identity),
        start_ms=start_ms,
        end_ms=end_ms,
    )


def read_model(folder: Path) -> Subject:
    """A converted model with its cards, and the corpora tokenized for it."""
    checkpoint = manifest.read(folder / "checkpoint")
    cards = {f"verify/{path.name}": path for path in sorted(folder.glob("*verify.*"))}
    files = {"checkpoint/manifest.json": folder / "checkpoint" / manifest.NAME}
    files |= {"config.json": folder / "checkpoint" / "config.json"} | cards
    files |= {f"corpora/{path.name}": path for path in sorted(folder.glob("corpora/*.manifest.json"))}
    config, params = files["config.json"], {"source": checkpoint.source}
    if config.is_file():
        params["config"] = read_json(config, MAKE_AGAIN)
    made_ms = mtime_ms(files["checkpoint/manifest.json"])
    return Subject(
        kind="model",
        name=f"{folder.name} (model)",
        folder=folder,
        identity=digest_of("model", folder.name, checkpoint.digest),
        digest=checkpoint.digest,
        description=f"The checkpoint in `{folder}`, converted from `{checkpoint.source.get('path')}`, and its cards.",
        params=flat(params),
        tags={"llmpipe": checkpoint.version},
        metrics=card_metrics(cards),
        artifacts=existing(files),
        start_ms=made_ms,
        end_ms=made_ms,
    )


def _status(folder: Path, record: dict[str, Any], finished: bool) -> Any:
    if finished:
        return "FINISHED" if record.get("exit_reason", "finished") == "finished" else "FAILED"
    return "FAILED" if failure.read(folder) else "RUNNING"


def _weights_digest(folder: Path, record: dict[str, Any]) -> str:
    """What the run made, by its manifest; an older folder without one is known by what run.json says."""
    if (folder / "weights" / manifest.NAME).is_file():
        return manifest.read(folder / "weights").digest
    if record.get("weights_digest"):
        return record["weights_digest"]
    raise UserError(f"{folder} has run.json but no weights/{manifest.NAME}: run finetune again")


def _params(record: dict[str, Any]) -> dict[str, str]:
    data = {Path(part["prefix"]).name: part.get("weight", 1.0) for part in record.get("data") or []}
    told = {key: record.get(key) for key in ("recipe", "layout", "split")}
    return flat(told | {"model": (record.get("model") or {}).get("path"), "data": data})


def _tags(record: dict[str, Any], hosts: list[str]) -> dict[str, str]:
    """Where the training comes from; the mlflow. ones stand in the page's own places."""
    origin = record.get("origin") or {}
    tags = {key: record.get(key) for key in ("exit_reason", "llmpipe", "torch")}
    tags |= {key: origin.get(key) for key in ("git_commit", "config_digest", "command")}
    tags |= {"model.checkpoint_digest": (record.get("model") or {}).get("checkpoint_digest")}
    tags |= {f"data.{item.name}.digest": item.digest for item in _datasets(record)}
    tags |= {"layout": _layout(record.get("layout") or {}), "hosts": ", ".join(hosts) or origin.get("host")}
    tags |= {
        "mlflow.source.name": "llmpipe finetune" if origin else None,
        "mlflow.source.type": "LOCAL" if origin else None,
        "mlflow.source.git.commit": origin.get("git_commit"),
        "mlflow.user": origin.get("user"),
    }
    return {key: str(value) for key, value in tags.items() if value}


def _layout(layout: dict[str, Any]) -> str:
    """As in `2 nodes of 4 cuda, tp 2, pp 2, cp 1, dp 2`."""
    if not layout:
        return ""
    known = Layout()
    told = {key: layout.get(key, getattr(known, key)) for key in ("nodes", "gpus_per_node", "device")}
    parts = ", ".join(f"{key} {layout.get(key, 1)}" for key in ("tp", "pp", "cp", "dp"))
    return f"{told['nodes']} node{'s' * (told['nodes'] > 1)} of {told['gpus_per_node']} {told['device']}, {parts}"


def _datasets(record: dict[str, Any]) -> list[Dataset]:
    parts = {"data": "train", "validation": "validation", "test": "test"}
    return [
        Dataset(name=Path(entry["prefix"]).name, digest=entry["digest"], prefix=entry["prefix"], part=part)
        for key, part in parts.items()
        for entry in record.get(key) or []
        if entry.get("digest")
    ]


def _curves(folder: Path, record: dict[str, Any], finished: bool) -> list[Curves]:
    """Of the steps, and of each node; all lines of a file that is not there come later."""
    metrics = metrics_file(folder, finished)
    steps = [Curves(path=metrics, done_tag="llmpipe.steps", growing=not finished)] if metrics.is_file() else []
    nodes = sorted(folder.glob("system/*.jsonl"))
    alone = (record.get("layout") or {}).get("nodes", 1) == 1
    return steps + [
        Curves(path=path, done_tag=f"llmpipe.samples.{path.stem}", host=path.stem, alone=alone) for path in nodes
    ]


def _artifacts(folder: Path, record: dict[str, Any], finished: bool) -> dict[str, Path]:
    """Small files, never weights; a training's own while it goes on: what it was given."""
    configs = [located(folder, path) for path in record.get("config_files") or []]
    files = {
        f"config/{path.parent.name}/{path.name}": path for path in configs
    }  # a run's and its recipe's are namesakes
    files |= {name: folder / name for name in (RUN_FILES if finished else ("job.json",))}
    model = (record.get("model") or {}).get("path")
    return existing(files | (cards_of(located(folder, model)) if model else {}))
