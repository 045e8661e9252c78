"""Checkpoints written beside the training: it waits only while its state is copied to this machine's memory.

One is under way at a time. Its files are written, hashed and forced to the disk by a thread of each rank; the
manifest is written when all have done so. One that fails is said and given up: the next one tries again. Where a rank
does not answer the others, this attempt of the training ends instead: no later save could succeed.
"""

import logging
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.files import fsync, sha256
from llmpipe.train import lease, state
from llmpipe.train.faults import Watch
from llmpipe.train.job import Job
from llmpipe.train.optimizer import Optimizer
from llmpipe.train.piece import Piece
from llmpipe.train.saved import saved, step_of

WRITE_MINUTES = 30.0
"""How long a rank waits, at the least, for the files of another one: a busy disk takes longer than a step's sums."""
T = TypeVar("T")
log = logging.getLogger(__name__)


class Saver:
    """Saves a job's checkpoints; all ranks make it, and call its methods, together."""

    def __init__(self, job: Job, optimizer: Optimizer, watch: Watch):
        self.job, self.optimizer, self.watch = job, optimizer, watch
        # Of its own: threads that meet in the training's groups lock each other up.
        timeout = timedelta(minutes=max(job.timeout_minutes, WRITE_MINUTES))
        self.group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
        self.buffers: dict[str, torch.Tensor] = {}
        self.thread: Thread | None = None
        self.broken: Exception | None = None
        """What the ranks' group failed of, for good."""
        self.started = time.monotonic()
        self.saved = 0
        """The step of the last one that rank 0 published."""

    @property
    def minutes(self) -> float:
        """Since the last one began."""
        return (time.monotonic() - self.started) / 60

    def save(self, step: int) -> None:
        """Begin the checkpoint after `step` steps, when the one before is done."""
        self.wait()
        self.started = time.monotonic()
        directory = self.job.checkpoints / f"step-{step:08}"
        pieces = self._snapshot()
        told = state.counters(self.job, step, self.optimizer, self.watch)
        size = self.job.live.stat().st_size if dist.get_rank() == 0 else 0
        self.thread = Thread(target=self._write, args=(directory, pieces, told, size), name=f"save {step}", daemon=True)
        self.thread.start()

    def forget(self, after: int, step: int) -> None:
        """Remove those of more than `after` steps, up to `step`: training went back, and on without what they hold."""
        self.saved = after
        if dist.get_rank() == 0:
            for path in saved(self.job.checkpoints, step):
                if step_of(path) > after:
                    _remove(path)

    def wait(self) -> None:
        """Until none is under way; raises where none can ever be again."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.broken:
            raise self.broken

    def _snapshot(self) -> dict[str, Piece]:
        """This rank's state as it is now, in memory that the next snapshot takes again."""
        pieces = state.pieces(self.optimizer)
        for name, piece in pieces.items():
            if name not in self.buffers:
                on_gpu = piece.local.is_cuda
                self.buffers[name] = torch.empty_like(piece.local, device="cpu", pin_memory=on_gpu)
            self.buffers[name].copy_(piece.local, non_blocking=True)
        if self.optimizer.groups.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return {name: Piece(self.buffers[name], piece.shape, piece.offsets) for name, piece in pieces.items()}

    def _write(self, directory: Path, pieces: dict[str, Piece], told: dict[str, Any], metrics_size: int) -> None:
        """The thread: write and publish, or say why not."""
        step, lead, device = told["step"], dist.get_rank() == 0, self.optimizer.groups.device
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own, at first GPU 0, where torch would take memory
            self._together(lambda: self._make(directory, metrics_size) if lead else None)
            # Nothing copied ahead: with a GPU in the machine torch waits, for each piece, for the training's kernels.
            writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
            dcp_save({**pieces}, storage_writer=writer, process_group=self.group)
            hashes = self._together(lambda: _own_hashes(directory))
            if lead:
                lease.check(self.job.run)
                known = {name: digest for of_rank in hashes for name, digest in of_rank.items()}
                manifest.write(directory, "training_checkpoint", told, {**known})
                self.saved = step
                log.info("step %s: saved %s", step, directory)
                self._prune(directory.parent, step, told["watch"]["first_skipped"])
        except (OSError, UserError, CheckpointException) as error:  # a full disk, say: it may not end the training
            if lead:
                said = _said(error)
                log.warning("step %s: not saved in %s: %s; the next checkpoint tries again", step, directory, said)
                if lease.held(self.job.run):  # else the folder may be the other trainer's
                    shutil.rmtree(directory, ignore_errors=True)
        except Exception as error:
            self.broken = error

    def _make(self, directory: Path, metrics_size: int) -> None:
        """The empty folder with the metrics up to here."""
        lease.check(self.job.run)
        shutil.rmtree(directory, ignore_errors=True)  # left by a killed attempt
        directory.mkdir(parents=True)
        with self.job.live.open("rb") as live:
            lines = live.read(metrics_size)
        if lines.count(b"\n") != step_of(directory):  # some wait for room on the disk: train/line_file.py
            raise OSError(f"{self.job.live} is not written")
        (directory / self.job.live.name).write_bytes(lines)
        fsync(directory / self.job.live.name)

    def _prune(self, folder: Path, step: int, first_skipped: int) -> None:
        """Remove what is not needed any more; the checkpoint just published stays, whatever the disk says of others."""
        try:
            for path in self._not_needed(folder, step, first_skipped):
                _remove(path)
        except OSError as error:
            log.warning("%s: old checkpoints were not looked for: %s", folder, error)

    def _not_needed(self, folder: Path, step: int, first_skipped: int) -> list[Path]:
        """What killed attempts left, and all but the newest `keep` and the milestones, up to `step`.

        While steps are being skipped, the last one before them stays: training may have to go back to it.
        """
        recipe, found = self.job.recipe, saved(folder, step)
        whole = [path for path in found if (path / manifest.NAME).is_file()]
        kept = whole[: recipe.keep] + [path for path in whole if step_of(path) < first_skipped][:1]
        kept += [path for path in whole if recipe.milestones and step_of(path) % recipe.milestones == 0]
        return [path for path in found if path not in kept]

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What each rank's `work` returns; if that of one failed, all raise what it said."""
        mine: tuple[str | None, Any] = (None, None)
        try:
            mine = (None, work())
        except Exception as error:
            mine = (f"rank {dist.get_rank()}: {error}", None)
        of_all: list[tuple[str | None, Any]] = [mine] * dist.get_world_size()
        dist.all_gather_object(of_all, mine, group=self.group)
        if failed := next((error for error, _ in of_all if error), None):
            raise OSError(failed)
        return [result for _, result in of_all]


def _remove(directory: Path) -> None:
    """Take an old checkpoint away; one that resists is tried again after the next checkpoint."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        log.warning("%s is not needed any more, and was not removed: %s", directory, error)


def _said(error: BaseException) -> str:
    """What went wrong on the first rank on which it did, without torch's tracebacks of all."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause}"
    return str(error)


def _own_hashes(directory: Path) -> dict[str, str]:
    """The SHA-256 of the tensors' files that this rank wrote, `__RANK_*.distcp`."""
    return {path.name: sha256(path) for path in directory.glob(f"__{dist.get_rank()}_*.distcp")}
