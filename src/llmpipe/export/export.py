"""A trained model for the world: a directory in any format with its model card, checked before it takes its name."""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import llmpipe
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import CHECKPOINT, Target, check_floating, check_output, write, written_type
from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.source import TensorSource
from llmpipe.checkpoint.upload import check_may_upload, upload
from llmpipe.data.chat.templates import OWN_FILE
from llmpipe.export.card import model_card, read_table
from llmpipe.export.chat_template import add_chat_template
from llmpipe.export.greedy import greedy_check
from llmpipe.export.round_trip import check_round_trip
from llmpipe.export.usage import usage
from llmpipe.files import atomic_directory, write_json, write_text
from llmpipe.train.record import identity, run_record, weights_of
from llmpipe.verify.card import Check

log = logging.getLogger(__name__)


def export(path: Path, output: Path, target: Target = CHECKPOINT) -> manifest.Manifest:
    """Write a run's or a checkpoint's weights in a format; nothing is left if a check fails."""
    weights, run = weights_of(path), run_record(path)
    source = open_source(weights)
    check_floating(source)
    check_output(weights, output)
    with atomic_directory(output) as part:
        hashes = write(Mover(source), part, target)
        how = usage(target, source.shape, target.dtype or source.dtype("embedding.weight"), part)
        template = add_chat_template(part, run) if target.to == "hf" else None
        if template:
            note = f"`{OWN_FILE}` is the template {template} of the chats that it was trained on"
            how = replace(how, notes=(*how.notes, note))
        card = model_card(run.get("name") or output.name, source.shape, identity(weights), run, read_table(path), how)
        write_text(part / "README.md", card)
        write_json(part / "check.json", _checked(weights, part, target, source))
        return manifest.write(part, "export", made_from(path, target), hashes)


def export_and_push(path: Path, output: Path, target: Target, repository: str) -> str:
    """Export, unless the very same export is there already, and upload it; returns its page on the hub.

    Nothing is sent before the gate has passed.
    """
    check_may_upload(repository)
    if is_export_of(output, path, target):
        log.info("%s is this export already, and whole: it is uploaded as it is", output)
    else:
        export(path, output, target)
    return upload(output, repository)


def is_export_of(output: Path, path: Path, target: Target) -> bool:
    """Whether a directory is a finished export of these weights in this format; UserError if its files were changed."""
    if not (output / manifest.NAME).is_file():
        return False
    found, source = manifest.read(output), made_from(path, target)
    same = found.kind == "export" and found.source == source and found.version == llmpipe.__version__
    return same and source["digest"] is not None and bool(manifest.check(output))


def made_from(path: Path, target: Target) -> dict[str, Any]:
    """For the manifest: the weights, the run, and what they were written as."""
    pp, vp, layers = target.stages.pp, target.stages.vp, [*target.stages.layers]
    stages = {"pp": pp, "vp": vp, "layers": layers} if target.to == "megatron" else {}
    split = {"tp": target.tp} if target.to in ("meta", "megatron") else {}
    dialect = {"dialect": target.dialect} if target.to == "megatron" else {}
    dtype = {"dtype": str(target.dtype).removeprefix("torch.")} if target.dtype else {}
    format = {"to": target.to} | dialect | split | stages | dtype
    return {**identity(weights_of(path)), "run": run_record(path).get("name"), "format": format}


def _checked(weights: Path, part: Path, target: Target, source: TensorSource) -> dict[str, Any]:
    """The gate's rows, for check.json; UserError if one fails."""
    checks, texts = check_round_trip(weights, part, written_type(source, target)), []
    if target.to == "hf":
        check, texts = greedy_check(weights if target.dtype is None else part, part)
        checks.append(check)
    rows = [asdict(_steady(check)) for check in checks]
    return {"checks": rows} | ({"texts": texts} if texts else {})


def _steady(check: Check) -> Check:
    """Measured numbers as powers of ten that they do not exceed.

    Their last digits may hang on the number of threads, but a model always exports to the same bytes.
    """
    if not isinstance(check.value, float) or check.value.is_integer():
        return check
    at_most = 10.0 ** math.ceil(math.log10(check.value)) if check.value > 0 else 0.0
    return replace(check, value=at_most)
