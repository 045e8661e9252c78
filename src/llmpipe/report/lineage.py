"""From the corpus and the source's weights to the export: what was made of what, by the hashes of the manifests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.checkpoint.manifest import Manifest
from llmpipe.report.gather import Dataset, Run, read_manifest
from llmpipe.report.html import count


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing in the chain."""

    kind: str
    name: str
    digest: str | None = None
    """SHA-256, of a file or over a directory's files."""
    told: str = ""
    holds: bool | None = None
    """Whether it was made of the very bytes that lie there now; None where that cannot be told."""
    files: tuple[tuple[str, str | None], ...] = ()
    """Name and SHA-256 of each file."""


def lineage(run: Run) -> list[tuple[str, list[Step]]]:
    """Chains, each with its title: the model's, each dataset's, and what they came to."""
    data = [(f"Data {dataset.name} ({dataset.part})", _data(dataset)) for dataset in run.datasets]
    chains = [("Model", _model(run)), *data, ("Training", _training(run))]
    return [(title, steps) for title, steps in chains if steps]


def _model(run: Run) -> list[Step]:
    """Source → checkpoint → rank files; of a run that started from a checkpoint there are no rank files."""
    name, start = Path(run.record["model"]["path"]), read_manifest(run.model)
    if run.model is None or start is None:
        digest = run.record["model"].get("checkpoint_digest")
        return [Step(kind="checkpoint", name=str(name), digest=digest, told="no longer there")]
    if start.kind == "checkpoint":
        return _checkpoint(name, start, run)
    checkpoint = read_manifest(run.model.parent / "checkpoint")
    holds = None if checkpoint is None else start.source.get("checkpoint") == checkpoint.digest
    ranks = Step(kind="rank files", name=str(name), digest=start.digest, told=_made(start), holds=holds)
    return [*(_checkpoint(name.parent / "checkpoint", checkpoint, run) if checkpoint else []), ranks]


def _checkpoint(name: Path, made: Manifest, run: Run) -> list[Step]:
    trained_from = run.record["model"].get("checkpoint_digest")
    holds = None if trained_from is None else trained_from == made.digest
    step = Step(kind="checkpoint", name=str(name), digest=made.digest, told=_made(made), holds=holds)
    return [_source(made.source), step]


def _source(source: dict[str, Any]) -> Step:
    files = tuple((name, digest) for name, digest in (source.get("files") or {}).items())
    form = source.get("format")
    return Step(
        kind="source weights",
        name=str(source.get("path", "unknown")),
        digest=source.get("digest"),
        told=f"in {form}'s format" if form else "",
        files=files,
    )


def _data(dataset: Dataset) -> list[Step]:
    """The corpus's files → the dataset."""
    facts = dataset.facts or {}
    told = dataset.missing
    if tokenizer := facts.get("tokenizer"):
        told = f"tokenized with {tokenizer['path']}, SHA-256 {tokenizer['sha256'][:12]}, llmpipe {facts['llmpipe']}"
    tokens = Step(kind="dataset", name=dataset.prefix, digest=dataset.digest, told=told, holds=dataset.is_same)
    sources = facts.get("sources", [])
    if not sources:
        return [tokens]
    size = sum(source["bytes"] for source in sources)
    files = tuple((source["path"], source.get("sha256")) for source in sources)
    name = files[0][0] if len(files) == 1 else f"{len(files):,} files"
    return [Step(kind="corpus", name=name, told=f"{size:,} bytes", files=files), tokens]


def _training(run: Run) -> list[Step]:
    """The trained weights, and the export."""
    weights, export = (read_manifest(run.folder / name) for name in ("weights", "export"))
    if weights is None:
        return []
    known = run.record.get("weights_digest")
    steps = [
        Step(
            kind="trained weights",
            name=str(run.folder / "weights"),
            digest=weights.digest,
            told=_made(weights),
            holds=None if known is None else known == weights.digest,
        )
    ]
    if export is not None:
        form = (export.source.get("format") or {}).get("to", "hf")
        told = f"in {form}'s format, {_made(export)}"
        holds = export.source.get("digest") == weights.digest
        steps.append(Step(kind="export", name=str(run.folder / "export"), digest=export.digest, told=told, holds=holds))
    return steps


def _made(found: Manifest) -> str:
    size = sum(entry["bytes"] for entry in found.files.values())
    return f"{count(len(found.files), 'file')}, {size:,} bytes, llmpipe {found.version}"
