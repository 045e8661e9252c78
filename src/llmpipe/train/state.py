"""Training checkpoints: layout-free, written aside, hashed, published by their manifest (design decision 14).

    RUN/checkpoints/HASH/step-00000100/   torch.distributed.checkpoint's files, and manifest.json last

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
from llmpipe.model.load import local_slices, table_row
from llmpipe.parallel.compat import Piece
from llmpipe.parallel.groups import Groups
from llmpipe.train.optimizer import Optimizer

KEEP = 2  # the newest, and one more should it turn out damaged
log = logging.getLogger(__name__)


def save(folder: Path, step: int, optimizer: Optimizer) -> None:
    """Write the checkpoint after `step` steps; all ranks call it together, and return when it is published."""
    directory = folder / f"step-{step:08}"
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)  # left by a killed attempt
        directory.mkdir(parents=True)
    dist.barrier()
    dcp_save(_pieces(optimizer), checkpoint_id=directory)
    if dist.get_rank() == 0:
        manifest.write(directory, "training_checkpoint", {"step": step})
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
        log.info("step %s: saved %s", step, directory)
    dist.barrier()


def resume(folder: Path, optimizer: Optimizer) -> int:
    """Load the newest whole checkpoint, if there is one; returns the steps done, 0 to start."""
    found: list[int | None] = [_newest(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    step = found[0] or 0
    if step:
        dcp_load(_pieces(optimizer), checkpoint_id=folder / f"step-{step:08}")
        for state in optimizer.adamw.state.values():
            state["step"].fill_(step)
        if dist.get_rank() == 0:
            log.info("resumed after step %s from %s", step, folder)
    return step


def _newest(folder: Path) -> int | None:
    """The step of the newest checkpoint whose manifest and hashes fit; others are named in the log."""
    for directory in sorted(folder.glob("step-*"), reverse=True):
        try:
            return int(manifest.check(directory).source["step"])
        except UserError as error:
            log.warning("not resumed from %s: %s", directory, error)
    for other in folder.parent.glob("*"):
        if other != folder:
            log.warning(
                "%s has checkpoints of other inputs (model, data or recipe): left alone, not resumed from", other
            )
    return None


def _pieces(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """This rank's part of weights and optimizer state; the pieces share their storage."""
    groups, shape = optimizer.groups, optimizer.shape
    pieces: dict[str, torch.Tensor] = {}
    for key, parameter in optimizer.parameters.items():
        full, offsets = table_row(shape, key).shape(shape), _offsets(optimizer, key, groups)
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
    slices = local_slices(optimizer.shape, key, layout.tp, at.tp, layout.dp, at.dp)
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
