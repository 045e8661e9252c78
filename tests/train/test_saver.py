"""Checkpoints that are written beside the training: whole or not there, whatever happens to them."""

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from jobs import RECIPE, assert_same_weights, make_job, run_job

from llmpipe.parallel.processes import run_ranks
from llmpipe.train import saver
from llmpipe.train.job import Job
from llmpipe.train.loop import train
from llmpipe.train.setup import prepare

SHORT = replace(RECIPE, steps=6, save_every=2, keep=9)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(checkpoint, dataset, tmp_path_factory.mktemp("undisturbed"), recipe=SHORT, dp=2)
    run_job(job)
    return job


def whole(job: Job) -> list[str]:
    return sorted(path.parent.name for path in job.checkpoints.glob("*/manifest.json"))


def train_with_a_full_disk(job: Job) -> bool:
    """For rank 1's part of step 4: the kernel's own full device."""
    make = saver.Saver._make

    def make_full(self: saver.Saver, directory: Path, metrics_size: int) -> None:
        make(self, directory, metrics_size)
        if directory.name == "step-00000004":
            (directory / "__1_0.distcp").symlink_to("/dev/full")

    saver.Saver._make = make_full
    logging.getLogger("llmpipe").addHandler(logging.FileHandler(job.run / "log.txt"))
    return train(job)


def test_a_full_disk_ends_no_training(undisturbed, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=SHORT, dp=2)
    assert run_ranks(train_with_a_full_disk, 2, job) == [True, True]
    assert whole(job) == ["step-00000002", "step-00000006"]
    assert not (job.checkpoints / "step-00000004").exists()
    said = (job.run / "log.txt").read_text()
    assert "step 4: not saved" in said and "No space left on device" in said and "tries again" in said
    assert_same_weights(undisturbed.run / "weights", job.run / "weights")


def train_beside_a_slow_save(job: Job) -> bool:
    """The checkpoint of step 4 is written when step 6 is done."""
    save = saver.dcp_save

    def save_slowly(*given: Any, storage_writer: Any, **more: Any) -> Any:
        deadline = time.monotonic() + 60
        while storage_writer.path.name == "step-00000004" and len(job.live.read_text().splitlines()) < 6:
            assert time.monotonic() < deadline, "training waits for the save"
            time.sleep(0.01)
        return save(*given, storage_writer=storage_writer, **more)

    saver.dcp_save = save_slowly  # type: ignore[assignment]
    return train(job)


def test_a_checkpoint_is_of_its_step_though_training_went_on(undisturbed, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=SHORT, dp=2)
    assert run_ranks(train_beside_a_slow_save, 2, job) == [True, True]
    assert whole(job) == ["step-00000002", "step-00000004", "step-00000006"]
    assert len((job.checkpoints / "step-00000004/live.jsonl").read_text().splitlines()) == 4
    shutil.rmtree(job.checkpoints / "step-00000006")
    (job.run / "run.json").unlink()
    shutil.rmtree(job.run / "weights")
    run_job(job)  # from step 4
    assert_same_weights(undisturbed.run / "weights", job.run / "weights")


def test_it_leaves_after_the_step_that_was_asked_for(undisturbed, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=SHORT, dp=2)
    leaving = replace(job, exit_at_step=3)
    for _ in range(2):  # again, it has nothing to do
        assert run_ranks(train, 2, leaving) == [False, False]
        assert whole(job) == ["step-00000002", "step-00000003"]
    run_job(job)
    assert_same_weights(undisturbed.run / "weights", job.run / "weights")


def test_the_newest_and_the_milestones_are_kept(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(SHORT, steps=8, keep=2, milestones=3))
    left = job.checkpoints / "step-00000001"  # by a killed attempt
    left.mkdir(parents=True)
    copy = job.checkpoints / "step-00000002.bak"  # by a person
    copy.mkdir()
    run_job(job)
    assert whole(job) == ["step-00000003", "step-00000006", "step-00000008"]
    assert not left.exists() and copy.exists()


def train_beside_one_that_cannot_be_removed(job: Job) -> bool:
    rmtree = shutil.rmtree

    def resist(path: Path, **options: Any) -> None:
        if path.name == "step-00000002" and (path / "manifest.json").exists():
            raise OSError("Device or resource busy")
        rmtree(path, **options)

    saver.shutil.rmtree = resist
    logging.getLogger("llmpipe").addHandler(logging.FileHandler(job.run / "log.txt"))
    return train(job)


def test_an_old_one_that_cannot_be_removed_costs_no_new_one(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(SHORT, keep=1))
    assert run_ranks(train_beside_one_that_cannot_be_removed, 1, job) == [True]
    assert whole(job) == ["step-00000002", "step-00000006"]
    said = (job.run / "log.txt").read_text()
    assert "not saved" not in said and said.count("step-00000002 is not needed any more, and was not removed") == 2


def train_where_old_ones_cannot_be_listed(job: Job) -> bool:
    def fail(*_: Any) -> list[Path]:
        raise OSError("Stale file handle")

    saver.Saver._not_needed = fail  # type: ignore[method-assign]
    logging.getLogger("llmpipe").addHandler(logging.FileHandler(job.run / "log.txt"))
    return train(job)


def test_a_failed_look_for_old_ones_costs_no_new_one(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(SHORT, keep=1))
    assert run_ranks(train_where_old_ones_cannot_be_listed, 1, job) == [True]
    assert whole(job) == ["step-00000002", "step-00000004", "step-00000006"]
    said = (job.run / "log.txt").read_text()
    assert "not saved" not in said and said.count("old checkpoints were not looked for: Stale file handle") == 3


def test_one_is_due_by_the_clock(checkpoint, dataset, tmp_path) -> None:
    recipe = replace(SHORT, steps=3, save_every=50, save_minutes=1e-9)
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe)
    run_job(job)
    assert whole(job) == ["step-00000001", "step-00000002", "step-00000003"]


def save_as_on_a_gpu(job: Job) -> list[tuple[str, torch.device]]:
    """Which thread takes which GPU, on a rank whose GPU is the second one."""
    trainer, taken = prepare(job), []
    trainer.optimizer.groups = replace(trainer.groups, device=torch.device("cuda", 1))
    torch.cuda.current_stream = Mock()
    torch.cuda.set_device = lambda device: taken.append((current_thread().name, device))
    job.live.write_text("{}\n")
    beside = saver.Saver(job, trainer.optimizer, trainer.watch)
    beside.save(1)
    beside.wait()
    return taken


def test_the_thread_that_writes_takes_its_ranks_gpu(checkpoint, dataset, tmp_path) -> None:
    """CUDA's current device is a thread's: left alone, all ranks' threads would take memory of the first GPU."""
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=SHORT)
    assert run_ranks(save_as_on_a_gpu, 1, job) == [[("save 1", torch.device("cuda", 1))]]
    assert whole(job) == ["step-00000001"]


def train_with_a_rank_that_hangs_in_a_save(job: Job) -> bool:
    """Rank 1 does not come to the end of the checkpoint of step 2."""
    own_hashes = saver._own_hashes

    def hang(directory: Path) -> dict[str, str]:
        if dist.get_rank() == 1:
            time.sleep(60)
        return own_hashes(directory)

    saver._own_hashes, saver.WRITE_MINUTES = hang, 0.02
    return train(job)


def test_one_that_a_rank_does_not_end_ends_the_attempt(undisturbed, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=SHORT, dp=2)
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 failed(.|\n)*([Tt]imed out|timeout)"):
        run_ranks(train_with_a_rank_that_hangs_in_a_save, 2, replace(job, timeout_minutes=0.02))
    assert whole(job) == []
    run_job(job)
    assert_same_weights(undisturbed.run / "weights", job.run / "weights")
