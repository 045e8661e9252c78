"""README.md of an exported model: Hugging Face's model card, from the run's own records."""

from pathlib import Path
from typing import Any

import llmpipe
from llmpipe.export.usage_text import Usage
from llmpipe.families import Shape


def model_card(name: str, shape: Shape, weights: dict[str, Any], run: dict[str, Any], table: str, usage: Usage) -> str:
    """What the model is, how it is read, what it was trained from and on, how it measures.

    `run` is empty for a plain checkpoint.
    """
    parts = [front(usage), f"# {name}\n", usage.markdown(), shape_section(shape, usage)]
    if run:
        parts.append(training_section(run))
    if table:
        parts.append(f"## Evaluation\n\n{table}")
    parts.append(provenance_section(weights, run))
    return "\n".join(parts)


def front(usage: Usage) -> str:
    """What the hub reads of a card; it knows transformers' format alone."""
    library = "library_name: transformers\n" if usage.system == "transformers" else ""
    return f"---\n{library}pipeline_tag: text-generation\ntags:\n- llmpipe\n---\n"


def shape_section(shape: Shape, usage: Usage) -> str:
    """The model's sizes."""
    return (
        "## Model\n\n"
        f"{shape.family}, {shape.num_layers} layers, hidden size {shape.hidden}, {shape.num_heads} query and"
        f" {shape.num_kv_heads} KV heads, {shape.vocab} tokens, {shape.max_positions} positions; {usage.format}.\n"
    )


def training_section(run: dict[str, Any]) -> str:
    """From which weights, on which data, by which recipe."""
    data = "\n".join(
        f"| {Path(part['prefix']).name} | {part.get('weight', 1.0):g} | {part.get('digest', '')} |"
        for part in run.get("data") or []
    )
    recipe = "\n".join(f"| {key} | {value} |" for key, value in (run.get("recipe") or {}).items())
    return (
        "## Training\n\n"
        f"Trained from {(run.get('model') or {}).get('path')} for {run.get('steps')} steps,"
        f" {run.get('tokens', 0):,} tokens; documents split {run.get('split')} into train, validation, test.\n\n"
        f"| data | weight | SHA-256 |\n|---|---|---|\n{data}\n\n"
        f"| recipe | |\n|---|---|\n{recipe}\n"
    )


def provenance_section(weights: dict[str, Any], run: dict[str, Any]) -> str:
    """The hashes that lead back to the source."""
    lines = [
        ("weights", None if run else weights.get("path")),
        ("SHA-256 of the weights", weights.get("digest")),
        ("checkpoint trained from", (run.get("model") or {}).get("checkpoint_digest")),
        ("run", run.get("name")),
        ("llmpipe", llmpipe.__version__),
        ("torch", run.get("torch")),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines if value)
    return (
        f"## Provenance\n\n| | |\n|---|---|\n{rows}\n\n"
        "`manifest.json` has the SHA-256 of every file, `check.json` the comparison of this directory, read back, with"
        " the trained model.\n"
    )


def read_table(run: Path) -> str:
    """The run's evaluation without its heading; nothing if it has not been evaluated."""
    path = run / "evaluate" / "table.md"
    return path.read_text().partition("\n\n")[2] if path.is_file() else ""
