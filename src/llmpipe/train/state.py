"""Training checkpoints: layout-free, written aside, hashed, published by their manifest (design decision 14).

    RUN/checkpoints/HASH/step-00000100/   torch.distributed.checkpoint's files, live.jsonl so far, manifest.json last

Every tensor stands there whole, under our name with "model.", "exp_avg." or "exp_avg_sq." before it; a rank writes
and reads its own part. A folder without a manifest, or with one that does not fit, is never resumed from.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.model.load import local_slices
from llmpipe.train import lease
from llmpipe.train.faults import Watch
from llmpipe.train.job import Job
from llmpipe.train.optimizer import Optimizer
from llmpipe.train.piece import Piece
from llmpipe.train.saved import saved, step_of

log = logging.getLogger(__name__)


def counters(job: Job, step: int, optimizer: Optimizer, watch: Watch) -> dict[str, Any]:
    """What a checkpoint's manifest keeps beside the tensors."""
    skipped = sorted(asked for asked in {*job.recipe.skip_steps} if asked <= step)
    return {"step": step, "skip_steps": skipped, **optimizer.counters(), "watch": watch.state()}


def resume(job: Job, optimizer: Optimizer, watch: Watch) -> int:
    """Load the newest whole checkpoint and its metrics, if there is one; returns the steps done, 0 to start."""
    directory = newest(job, job.recipe.steps)
    step = load(directory, optimizer, watch) if directory else 0
    if dist.get_rank() == 0:
        lease.check(job.run)
        # What stands in live.jsonl now may go on beyond the checkpoint, or be of other inputs.
        job.live.write_bytes((directory / job.live.name).read_bytes() if directory else b"")
        if directory:
            log.info("resumed after step %s from %s", step, directory)
        else:
            _name_others(job.checkpoints)
    return step


def load(directory: Path, optimizer: Optimizer, watch: Watch) -> int:
    """Take over a checkpoint's weights, optimizer state and counters; returns its step. All ranks call it together."""
    dcp_load({**pieces(optimizer)}, checkpoint_id=directory)
    told = manifest.read(directory).source
    optimizer.resume(told["step"], told)
    watch.load(told["watch"])
    return told["step"]


def newest(job: Job, at_most: int) -> Path | None:
    """The newest checkpoint of at most so many steps whose files fit its manifest; damaged ones are named in the log.

    All ranks call it together: each hashes its share of the files.
    """
    found: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        found = [[path for path in saved(job.checkpoints, at_most) if _skipped_the_same(path, job.recipe.skip_steps)]]
    dist.broadcast_object_list(found, src=0)
    return next((directory for directory in found[0] if _is_whole(directory)), None)


def _skipped_the_same(directory: Path, skip_steps: list[int]) -> bool:
    """Whether a checkpoint passed over just those of its steps that are to be; a damaged one is judged later."""
    try:
        passed = manifest.read(directory).source["skip_steps"]
    except (UserError, OSError, KeyError):
        return True
    step = step_of(directory)
    if passed == sorted({asked for asked in skip_steps if asked <= step}):
        return True
    log.info("not resumed from %s: it passed over the steps %s, skip_steps asks for %s", directory, passed, skip_steps)
    return False


def _is_whole(directory: Path) -> bool:
    try:
        manifest.check(directory, dist.get_rank(), dist.get_world_size())
        error = None
    except (UserError, OSError) as damage:  # a disk that fails here may give the one before
        error = str(damage)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error), None)
    if first and dist.get_rank() == 0:
        log.warning("not resumed from %s: %s", directory, first)
    return first is None


def _name_others(folder: Path) -> None:
    for other in folder.parent.glob("*"):
        if other != folder and any(other.glob("step-*")):
            log.warning(
                "%s has checkpoints of other inputs (model, data or recipe): left alone, not resumed from", other
            )


def pieces(optimizer: Optimizer) -> dict[str, Piece]:
    """This rank's part of weights and optimizer state; the pieces share their storage."""
    shape = optimizer.shape
    parts: dict[str, Piece] = {}
    for key, parameter in optimizer.parameters.items():
        full, start = FAMILIES[shape.family].row(key, shape).shape(shape), offsets(optimizer, key)
        state = _adam_state(optimizer, parameter)
        for prefix, tensor in (
            ("model", parameter.data),
            ("exp_avg", state["exp_avg"]),
            ("exp_avg_sq", state["exp_avg_sq"]),
        ):
            parts[f"{prefix}.{key}"] = Piece(tensor, full, start)
    return parts


def offsets(optimizer: Optimizer, key: str) -> tuple[int, ...]:
    """Where this rank's shard begins in the full tensor."""
    groups = optimizer.groups
    layout, at = groups.layout, groups.at
    slices = local_slices(optimizer.shape, key, layout.tp, at.tp, layout.shards, groups.shard_rank)
    sizes = tuple(part.stop - part.start for part in slices)
    assert sizes == tuple(optimizer.parameters[key].shape), (key, sizes, optimizer.parameters[key].shape)
    return tuple(part.start for part in slices)


def _adam_state(optimizer: Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter, made as AdamW itself makes it when there is none yet."""
    state = optimizer.adamw.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter.data)
        state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    return state
