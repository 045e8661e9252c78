"""What each step tells on a disk that is full for a while, or for good."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from jobs import RECIPE, make_job

from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks
from llmpipe.train import line_file
from llmpipe.train.job import Job
from llmpipe.train.line_file import LineFile
from llmpipe.train.loop import train

SHORT = replace(RECIPE, steps=6)


def train_on_a_full_disk(job: Job, partly: bool) -> list[str]:
    """In steps 3 and 4 the kernel takes no byte of their lines, or a part; returns the warnings."""
    add, (_, most) = LineFile.add, resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit is an OSError
    said: list[str] = []
    line_file.log.warning = lambda text, *values: said.append(text % values)  # type: ignore[method-assign, assignment]

    def add_to_a_full_disk(self: LineFile, line: dict[str, Any]) -> None:
        if line["step"] in (3, 4):
            first, second, *_ = self.path.read_bytes().splitlines(keepends=True)
            room = {3: 10, 4: len(first) + 50}[line["step"]] if partly else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(first + second) + room, most))
        add(self, line)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if line["step"] in (3, 4):
            assert [line["step"] for line in self.read()] == [*range(1, line["step"] + 1)]
            assert not partly or not self.path.read_bytes().endswith(b"\n")

    LineFile.add = add_to_a_full_disk  # type: ignore[method-assign]
    assert train(job)
    return said


@pytest.mark.parametrize("partly", [False, True])
def test_lines_that_a_full_disk_does_not_take_are_written_later(partly, checkpoint, dataset, tmp_path) -> None:
    job = replace(make_job(checkpoint, dataset, tmp_path / "run", SHORT), all_ranks=True)
    (said,) = run_ranks(train_on_a_full_disk, 1, job, partly)
    assert [text.split(" is not written: ")[0] for text in said] == [str(job.live), f"{job.run}/ranks/rank-0.jsonl"]
    for path in (job.run / "metrics.jsonl", job.run / "ranks/rank-0.jsonl"):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_stays_full_is_named_at_the_end(checkpoint, dataset, tmp_path, monkeypatch) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", SHORT)
    job.live.symlink_to("/dev/full")
    monkeypatch.setattr(os, "truncate", lambda *_: None)  # nothing stands in a device
    with pytest.raises(UserError, match=r"live\.jsonl is not written: No space left on device: make room, then run"):
        run_ranks(train, 1, job)
    assert not (job.run / "weights").exists()


def test_what_stands_there_in_part_is_read_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By going back, say, while the file system is away: not even what it has taken can be cut off."""

    def away(*_: Any) -> NoReturn:
        raise OSError("Stale file handle")

    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n')
    lines = LineFile(path)
    with monkeypatch.context() as failing:
        failing.setattr(Path, "open", away)
        lines.add({"step": 2})
        failing.setattr(os, "truncate", away)
        lines.add({"step": 3})
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert lines.read() == [{"step": 1}, {"step": 2}, {"step": 3}]
    lines.add({"step": 4})
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
