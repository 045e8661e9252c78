"""RUN/job.json: what a training is given, and what of it makes it another training."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe, Schedule
from llmpipe.train.job import Job, job_split, read_job
from llmpipe.train.preflight import check_steps


def job(folder: Path, **more: object) -> Job:
    recipe = Recipe(seq_len=8, global_batch=2, steps=3, lr=1e-3)
    given = {"model": "m", "data": {"a": 1.0}, "split": [1.0, 0.0, 0.0], "output": str(folder)}
    return Job(recipe=recipe, layout=Layout(), **given | more)  # type: ignore[arg-type]


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = job(tmp_path, validation={"b": 1.0}, test={"c": 2.0})
    made.write()
    assert read_job(made.path) == made


def test_a_dataset_is_trained_on_or_held_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a is held out, for validation or test, and trained on as well: take it out"):
        replace(job(tmp_path), test={"a": 1.0})


def test_the_split_beside_held_out_datasets() -> None:
    assert job_split(None, held_out=False) == [969, 30, 1]
    assert job_split("8,1,1", held_out=False) == [8, 1, 1]
    assert job_split(None, held_out=True) == [1, 0, 0]
    with pytest.raises(UserError, match="--split 8,1,1 takes documents of --data away from training, but --validation"):
        job_split("8,1,1", held_out=True)


def test_steps_that_there_are_not_are_not_traced(tmp_path: Path) -> None:
    check_steps(job(tmp_path, profile_steps=[3, 9]))
    with pytest.raises(UserError, match="--profile-steps 4: there are only 3 steps to trace"):
        check_steps(job(tmp_path, profile_steps=[4, 9]))


def test_a_warmup_beyond_the_last_step_is_said(tmp_path: Path, caplog) -> None:
    for warmup, is_said in ((0.9, False), (3, False), (4, True)):
        caplog.clear()
        made = job(tmp_path)
        check_steps(replace(made, recipe=replace(made.recipe, schedule=Schedule(warmup=warmup))))
        assert ("goes on beyond the last of 3 steps: the rate never comes to lr 0.001" in caplog.text) is is_said
