"""A trained model for the world: a Hugging Face directory with its model card, checked before it is published."""

from pathlib import Path

import torch

from llmpipe.checkpoint import hf, manifest
from llmpipe.checkpoint.convert import check_output
from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.source import TensorSource
from llmpipe.export.card import model_card, read_table
from llmpipe.export.check import check_export, check_memory
from llmpipe.files import atomic_directory, write_json, write_text
from llmpipe.train.record import identity, run_record, weights_of


def export(path: Path, output: Path) -> manifest.Manifest:
    """Merge a run's or a checkpoint's weights into a Hugging Face directory; nothing is left if a check fails."""
    weights, run = weights_of(path), run_record(path)
    source = open_source(weights)
    check_output(weights, output)
    check_memory(source)
    with atomic_directory(output) as part:
        hashes = hf.write(Mover(source), part, stored_dtype(source))
        card = model_card(run.get("name") or output.name, source.shape, identity(weights), run, read_table(path))
        write_text(part / "README.md", card)
        write_json(part / "check.json", check_export(weights, part))
        return manifest.write(part, "export", {**identity(weights), "run": run.get("name")}, hashes)


def stored_dtype(source: TensorSource) -> torch.dtype | None:
    """The type of all tensors, so that config.json says it; None if they differ."""
    found = set(map(source.dtype, source.keys()))
    return found.pop() if len(found) == 1 else None
