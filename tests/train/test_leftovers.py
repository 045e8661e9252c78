"""A run folder tells of one training at a time, whichever inputs are trained into it."""

from dataclasses import replace
from pathlib import Path

import pytest
from jobs import make_job

from llmpipe import launch
from llmpipe.train.job import Job


def told(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in (folder / "log.txt", folder / "system/node7.jsonl", folder / "ranks/rank-0.jsonl")
        if path.exists()
    }


def test_what_another_training_told_stands_beside_its_checkpoints(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = iter("abcd")

    def ranks(*_: object) -> int:
        attempt = next(attempts)
        for name in ("log.txt", "system/node7.jsonl", "ranks/rank-0.jsonl"):
            path = job.run / name
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(attempt)
        return 0

    def train(given: Job) -> None:
        assert launch.launch(given, launch.Place(), None, 0) == 75

    monkeypatch.setattr(launch, "supervise_torchrun", ranks)
    job = make_job(checkpoint, dataset, tmp_path / "run")
    other = replace(job, recipe=replace(job.recipe, lr=1e-2))
    train(job)
    train(job)
    assert set(told(job.run).values()) == {"ab"} and len(told(job.run)) == 3

    train(other)
    assert told(job.run) == dict.fromkeys(told(job.checkpoints), "c")
    assert set(told(job.checkpoints).values()) == {"ab"}

    train(replace(job, recipe=replace(job.recipe, steps=30)))  # goes on with the first one
    assert set(told(job.run).values()) == {"abd"} and not told(job.checkpoints)
    assert set(told(other.checkpoints).values()) == {"c"}
