"""What a finished run leaves: weights/, metrics.jsonl and run.json, in this order, each whole or not there."""

import shutil
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import llmpipe
from llmpipe.checkpoint import manifest, rank_files
from llmpipe.checkpoint.convert import DTYPES
from llmpipe.families import Shape
from llmpipe.files import atomic_file, fsync, fsync_directory, write_json
from llmpipe.parallel.groups import Groups
from llmpipe.train import lease
from llmpipe.train.batches import Batches
from llmpipe.train.job import Job
from llmpipe.train.metrics import seconds_of
from llmpipe.train.record import of_job
from llmpipe.train.saver import WRITE_MINUTES


def publish(job: Job, model: nn.Module, shape: Shape, groups: Groups) -> None:
    """Publish the run; all ranks call it together."""
    digest = _publish_weights(job, model, groups)
    if dist.get_rank() == 0:
        with atomic_file(job.run / "metrics.jsonl") as file:
            file.write(job.live.read_bytes())
        write_json(job.run / "run.json", _record(job, shape, digest))
    dist.barrier()


def _publish_weights(job: Job, model: nn.Module, groups: Groups) -> str:
    """Each rank of dp 0 writes its rank file into one folder, named when all have; returns the digest."""
    part, final, layout = job.run / ".weights.part", job.run / "weights", groups.layout
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    dist.barrier()
    tensors = _to_write(model, groups, DTYPES[job.recipe.precision])
    # Of its own, for the others wait while a rank's file is written.
    timeout = timedelta(minutes=max(job.timeout_minutes, WRITE_MINUTES))
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
    written: tuple[str, str] | None = None
    metadata = {"checkpoint": job.model_digest()}
    if groups.data_rank == 0:
        at = groups.at
        sha256 = rank_files.write_rank(part, layout.tp, layout.stages, at.tp, at.pp, tensors, metadata)
        written = rank_files.file_name(at.tp, at.pp), sha256
        fsync(part / written[0])
    hashes: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, written, group=group)
    if dist.get_rank() == 0:
        source = {"checkpoint": job.model_digest(), "job": job.digest(), "tp": layout.tp, "pp": layout.pp}
        rank_files.finish(part, Path(job.model), "weights", source, dict(pair for pair in hashes if pair))
        lease.check(job.run)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        fsync_directory(job.run)
    dist.barrier()
    return manifest.read(final).digest


def _to_write(model: nn.Module, groups: Groups, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters that this rank writes, in main memory; all ranks call it together, for all gather each of them."""
    tensors: dict[str, torch.Tensor] = {}
    for key, parameter in model.named_parameters():
        whole = _whole(parameter)
        if groups.data_rank == 0:
            tensors[key] = whole.to("cpu", dtype)
        del whole  # before the next one is gathered: a device may not hold them all
    return tensors


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter gathered over dp: this tp rank's slice."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _record(job: Job, shape: Shape, digest: str) -> dict[str, object]:
    """run.json: what was run, on what, hashes, why it ended."""
    return of_job(job.with_inputs()) | {
        "exit_reason": "finished",
        "weights_digest": digest,
        "job_digest": job.digest(),
        "tokens": Batches(job.recipe).total * job.recipe.seq_len,
        "seconds": round(seconds_of(job.live), 3),
        "shape": asdict(shape),
        "llmpipe": llmpipe.__version__,
        "torch": torch.__version__,
    }
