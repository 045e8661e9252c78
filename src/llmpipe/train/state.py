"""Training checkpoints: layout-free, written aside, hashed, published by their manifest (design decision 14).

    RUN/checkpoints/HASH/step-00000100/   torch.distributed.checkpoint's files, live.jsonl so far, manifest.json last

Every tensor stands there whole, under our name with "model.", "exp_avg." or "exp_avg_sq." before it; a rank writes
and reads its own part. A folder without a manifest, or with one that does not fit, is never resumed from.
"""

import logging
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.files import fsync, sha256
from llmpipe.model.load import local_slices
from llmpipe.parallel.compat import Piece
from llmpipe.parallel.groups import Groups
from llmpipe.train.job import Job
from llmpipe.train.optimizer import Optimizer

KEEP = 2  # the newest, and one more should it turn out damaged
log = logging.getLogger(__name__)


def save(job: Job, step: int, optimizer: Optimizer) -> None:
    """Write the checkpoint after `step` steps; all ranks call it together, and return when it is published."""
    directory = job.checkpoints / f"step-{step:08}"
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)  # left by a killed attempt
        directory.mkdir(parents=True)
        shutil.copyfile(job.live, directory / job.live.name)
        fsync(directory / job.live.name)
    dist.barrier()
    dcp_save(_pieces(optimizer), checkpoint_id=directory)
    hashes = _hashes(directory)
    if dist.get_rank() == 0:
        manifest.write(directory, "training_checkpoint", {"step": step, **optimizer.counters()}, {**hashes})
        for old in _saved(directory.parent, step)[KEEP:]:
            shutil.rmtree(old)
        log.info("step %s: saved %s", step, directory)
    dist.barrier()


def resume(job: Job, optimizer: Optimizer) -> int:
    """Load the newest whole checkpoint and its metrics, if there is one; returns the steps done, 0 to start."""
    directory = newest(job.checkpoints, job.recipe.steps)
    if directory:
        dcp_load(_pieces(optimizer), checkpoint_id=directory)
        optimizer.resume(_step(directory), manifest.read(directory).source)
    if dist.get_rank() == 0:
        # What stands in live.jsonl now may go on beyond the checkpoint, or be of other inputs.
        job.live.write_bytes((directory / job.live.name).read_bytes() if directory else b"")
        if directory:
            log.info("resumed after step %s from %s", _step(directory), directory)
        else:
            _name_others(job.checkpoints)
    return _step(directory) if directory else 0


def newest(folder: Path, steps: int) -> Path | None:
    """The newest checkpoint of at most `steps` steps whose files fit its manifest; damaged ones are named in the log.

    All ranks call it together: each hashes its share of the files.
    """
    found: list[list[Path]] = [_saved(folder, steps) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    return next((directory for directory in found[0] if _is_whole(directory)), None)


def _saved(folder: Path, steps: int) -> list[Path]:
    """The folder's checkpoints, whole or not, of at most `steps` steps, the newest first.

    Later ones are there where a recipe's `steps` was lowered: they are of a longer training, and left alone.
    """
    return sorted((path for path in folder.glob("step-*") if _step(path) <= steps), reverse=True)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _is_whole(directory: Path) -> bool:
    try:
        manifest.check(directory, dist.get_rank(), dist.get_world_size())
        error = None
    except UserError as damage:
        error = str(damage)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error), None)
    if first and dist.get_rank() == 0:
        log.warning("not resumed from %s: %s", directory, first)
    return first is None


def _hashes(directory: Path) -> dict[str, str]:
    """The SHA-256 of the tensors' files: each rank hashes the ones that it wrote, `__RANK_*.distcp`."""
    own = {path.name: sha256(path) for path in directory.glob(f"__{dist.get_rank()}_*.distcp")}
    all_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_ranks, own)
    return {name: digest for hashes in all_ranks for name, digest in hashes.items()}


def _name_others(folder: Path) -> None:
    for other in folder.parent.glob("*"):
        if other != folder:
            log.warning(
                "%s has checkpoints of other inputs (model, data or recipe): left alone, not resumed from", other
            )


def _pieces(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """This rank's part of weights and optimizer state; the pieces share their storage."""
    groups, shape = optimizer.groups, optimizer.shape
    pieces: dict[str, torch.Tensor] = {}
    for key, parameter in optimizer.parameters.items():
        full, offsets = FAMILIES[shape.family].row(key, shape).shape(shape), _offsets(optimizer, key, groups)
        state = _adam_state(optimizer, parameter)
        for prefix, tensor in (
            ("model", parameter.data),
            ("exp_avg", state["exp_avg"]),
            ("exp_avg_sq", state["exp_avg_sq"]),
        ):
            pieces[f"{prefix}.{key}"] = Piece(tensor, full, offsets)
    return pieces


def _offsets(optimizer: Optimizer, key: str, groups: Groups) -> tuple[int, ...]:
    """Where this rank's shard begins in the full tensor."""
    layout, at = groups.layout, groups.at
    slices = local_slices(optimizer.shape, key, layout.tp, at.tp, groups.num_data, groups.data_rank)
    sizes = tuple(part.stop - part.start for part in slices)
    assert sizes == tuple(optimizer.parameters[key].shape), (key, sizes, optimizer.parameters[key].shape)
    return tuple(part.start for part in slices)


def _adam_state(optimizer: Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter, made as AdamW itself makes it when there is none yet."""
    state = optimizer.adamw.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if optimizer.fused else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter.data)
        state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    return state
