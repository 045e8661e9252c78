"""The stages before and after a training, and finetune itself, from the files that each leaves: a child run each."""

import csv
import json
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.data.dataset.manifest import manifest_path
from llmpipe.files import read_json
from llmpipe.track.curves import CHARTS
from llmpipe.track.subject import Subject, digest_of, existing, flat, is_number, metric_name, mtime_ms
from llmpipe.train.run_folder import MAKE_AGAIN, cards_of, located

MIB = 1 << 20
SEEN_AFTER = 0.5
"""Seconds after which Snakemake looks at a job's memory; before that it has seen the shell that starts the command."""


def stages(run: Path, record: dict[str, Any], identity: str) -> list[Subject]:
    """Those of a run's stages whose files are there; `record` is its run.json, or what is known while it trains."""
    model = located(run, record["model"]["path"]) if (record.get("model") or {}).get("path") else None
    found = [*_of_data(run, record), *(_of_model(model) if model else []), *_of_run(run, record)]
    return [_stage(identity, run, **values) for values in found]


def card_metrics(cards: dict[str, Path]) -> dict[str, float]:
    """What the verification measured."""
    read = {path.stem: read_json(path, MAKE_AGAIN) for path in cards.values() if path.suffix == ".json"}
    return {
        metric_name(f"{stem}/{check['name']}"): float(check["value"])
        for stem, card in read.items()
        for check in card.get("checks", [])
        if is_number(check.get("value"))
    }


def table_metrics(path: Path) -> dict[str, float]:
    """The evaluation table, one metric a cell; a section of charts a task."""
    rows = read_json(path, MAKE_AGAIN)["rows"] if path.is_file() else []
    return {
        metric_name(f"{row['task']}/{row['metric']}_{side}"): float(row[side])
        for row in rows
        for side in ("before", "after")
        if is_number(row.get(side))
    }


def _stage(identity: str, run: Path, *, name: str, main: Path, log: str = "", **values: Any) -> Subject:
    """A child run; `main` is the file that the stage writes last, `log` what the workflow's benchmark is called."""
    measured = _benchmark(main, log) if log else {}
    end_ms = mtime_ms(main)
    values["metrics"] = values.get("metrics", {}) | measured
    return Subject(
        kind="stage", name=name, folder=run, identity=digest_of(identity, name),
        start_ms=end_ms - int(1000 * measured.get("seconds", 0)), end_ms=end_ms, **values,
    )  # fmt: skip


def _benchmark(main: Path, log: str) -> dict[str, float]:
    """What Snakemake measured of a stage: seconds, and memory; nothing where it was run by hand."""
    project = next((above for above in main.resolve().parents if (above / "logs").is_dir()), Path())
    return benchmark(project / "logs" / f"{log}.benchmark.tsv")


def benchmark(path: Path) -> dict[str, float]:
    """`seconds` and `peak_memory_megabytes` of Snakemake's benchmark file, which has MiB; nothing without one."""
    if not path.is_file():
        return {}
    row = next(csv.DictReader(path.read_text().splitlines(), delimiter="\t"), {})
    columns = {"s": ("seconds", 1.0), "max_rss": ("peak_memory_megabytes", MIB / 1e6)}
    found = {
        name: float(row[key]) * unit
        for key, (name, unit) in columns.items()
        if row.get(key, "").replace(".", "", 1).isdigit()
    }
    if found.get("seconds", 1) < SEEN_AFTER:
        found.pop("peak_memory_megabytes", None)
    return found


def _of_data(run: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """tokenize: a child a corpus."""
    found = []
    for part in ("data", "validation", "test"):
        for entry in record.get(part) or []:
            prefix = located(run, f"{entry['prefix']}.manifest.json").with_name(Path(entry["prefix"]).name)
            file = manifest_path(prefix)
            if file.is_file():
                facts = read_json(file, MAKE_AGAIN)
                numbers = {key: float(value) for key, value in facts.items() if is_number(value)}
                told = {key: value for key, value in facts.items() if key not in numbers | {"files": 0, "sources": 0}}
                found.append(
                    {
                        "name": f"tokenize {prefix.name}", "main": file, "params": flat(told), "metrics": numbers,
                        "artifacts": {file.name: file}, "log": f"tokenize/{prefix.parents[1].name}.{prefix.name}",
                    }
                )  # fmt: skip
    return found


def _of_model(model: Path) -> list[dict[str, Any]]:
    """convert, shard and verify, of the rank files or the checkpoint that the training starts from."""
    name, found = model.parent.name, []
    checkpoint = model.parent / "checkpoint"
    if (checkpoint / manifest.NAME).is_file():
        config = existing({"config.json": checkpoint / "config.json"})
        told = {"config": read_json(config["config.json"], MAKE_AGAIN)} if config else {}
        found.append(_made("convert", checkpoint, f"convert/{name}", told, config))
    if model != checkpoint and (model / manifest.NAME).is_file():
        found.append(_made("shard", model, f"shard/{name}.{model.name}", {}, {}))
    if cards := cards_of(model):
        newest = max(cards.values(), key=mtime_ms)
        artifacts = {path.name: path for path in cards.values()}
        verdicts = {
            f"verdict.{path.stem}": read_json(path, MAKE_AGAIN).get("verdict", "none")
            for path in cards.values()
            if path.suffix == ".json"
        }
        found.append(
            {
                "name": "verify", "main": newest, "tags": verdicts, "metrics": card_metrics(cards),
                "artifacts": artifacts, "log": f"verify/{name}",
            }
        )  # fmt: skip
    return found


def _made(name: str, directory: Path, log: str, told: dict[str, Any], more: dict[str, Path]) -> dict[str, Any]:
    """A stage that leaves a directory with a manifest."""
    made = manifest.read(directory)
    size = sum(entry["bytes"] for entry in made.files.values()) / 1e9
    return {
        "name": name,
        "main": directory / manifest.NAME,
        "log": log,
        "digest": made.digest,
        "params": flat({"source": made.source, **told}),
        "tags": {"llmpipe": made.version, "path": str(directory)},
        "metrics": {"gigabytes": size, "files": float(len(made.files))},
        "artifacts": {manifest.NAME: directory / manifest.NAME} | more,
    }


def _of_run(run: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """finetune, evaluate and export, as far as the run has come."""
    found = []
    if (run / "run.json").is_file():
        totals = {key: float(record[key]) for key in ("steps", "tokens", "seconds") if is_number(record.get(key))}
        files = {name: run / name for name in ("job.json", "log.txt")}
        found.append(
            {
                "name": "finetune", "main": run / "run.json", "log": f"finetune/{run.name}",
                "params": flat({key: record.get(key) for key in ("recipe", "layout", "shape")}),
                "metrics": {f"total_{key}": value for key, value in totals.items()} | last_values(run),
                "artifacts": existing(files),
            }
        )  # fmt: skip
    table = run / "evaluate" / "table.json"
    if table.is_file():
        files = {name: run / "evaluate" / name for name in ("table.json", "table.md", "table.html")}
        found.append(
            {
                "name": "evaluate", "main": table, "log": f"evaluate/{run.name}",
                "metrics": table_metrics(table), "artifacts": existing(files),
            }
        )  # fmt: skip
    if (run / "export" / manifest.NAME).is_file():
        files = existing({name: run / "export" / name for name in ("README.md", "check.json")})
        found.append(_made("export", run / "export", f"export/{run.name}", {}, files))
    return found


def last_values(run: Path) -> dict[str, float]:
    """The training's numbers after its last step."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:  # the last line alone, of what may be a million
        file.seek(max(0, path.stat().st_size - 65536))
        last = file.read().splitlines()[-1:]
    try:
        line = json.loads(last[0]) if last else {}
    except ValueError:  # what reads all of it says so
        return {}
    return {CHARTS[key]: float(value) for key, value in line.items() if key in CHARTS and is_number(value)}
